"""The stage after stage 3: trains structure, decoder and predictor together."""

import copy

import torch
from torch import Tensor, nn

from tvqrap.models.assembly import SuperResolver, TextureTokenizer
from tvqrap.training.stages import MakeObjective, Stage, Step, StepRandomness
from vqprior.functional import index_cross_entropy, select_codes


class JointStage(Stage):
    """Trains structure, decoder and predictor together, on predicted codes.

    The paper freezes the decoder, which then has only seen true codes. Here it sees three kinds of
    samples, in this order: without codes, with true codes, and with predicted codes. The networks
    that determine the true codes (texture encoder, fusion, codebook) stay frozen.

    Args:
        tokenizer: The tokenizer; it is copied.
        predictor: The predictor to start from.
        make_objective: Makes the loss on the image.
        code_weight: Weight of the code-level loss.
        without_codes: Share of the samples without codes.
        true_codes: Share of the samples with true codes.

    Raises:
        ValueError: If the structure is regressed: its targets would change during training.
    """

    name = "joint"

    def __init__(
        self, tokenizer: TextureTokenizer, predictor: nn.Module, make_objective: MakeObjective, *,
        code_weight: float = 0.0, without_codes: float = 0.2, true_codes: float = 0.2,
    ) -> None:  # fmt: skip
        super().__init__()
        if tokenizer.structure.regressed:
            raise ValueError(
                "`tokenizer` must compute its structure from the low-resolution image, got one "
                "that regresses it."
            )
        self.config = tokenizer.config
        self.tokenizer = copy.deepcopy(tokenizer).requires_grad_(requires_grad=False).eval()
        learning = {"structure": self.tokenizer.structure, "decoder": self.tokenizer.decoder}
        self.trained = nn.ModuleDict({"predictor": predictor, **learning})
        self.trained.requires_grad_(requires_grad=True)
        self.objective = make_objective(self.tokenizer.decoder.last_layer.weight)
        self.code_weight = code_weight
        self.without_codes = without_codes
        self.true_codes = true_codes

    def forward(self, hr: Tensor, lr: Tensor, randomness: StepRandomness) -> Step:
        """Decodes the three kinds of samples and compares images."""
        tokenizer, predictor = self.tokenizer, self.trained["predictor"]
        truth = tokenizer.describe(hr, lr)
        structure = tokenizer.structure.expand(lr)
        logits = predictor(predictor.trunk(lr), structure)
        codes = tokenizer.codes.detach()
        texture, indices = select_codes(logits, codes)
        first, second = (
            round(share * len(hr))
            for share in (self.without_codes, self.without_codes + self.true_codes)
        )
        true = codes[truth.indices[first:second]]
        texture = torch.cat([torch.zeros_like(texture[:first]), true, texture[second:]])
        image = tokenizer.decoder(structure + texture.movedim(-1, 1), lr)
        loss, terms = self.objective(image, hr)
        terms["code"] = self.code_weight * index_cross_entropy(logits, truth.indices)
        return Step(loss + terms["code"], terms, indices, image)

    def model(self, trained: nn.Module) -> SuperResolver:
        """Returns the model to save: the tokenizer with its trained parts, and the predictor."""
        tokenizer = copy.deepcopy(self.tokenizer)
        tokenizer.structure, tokenizer.decoder = trained["structure"], trained["decoder"]
        return SuperResolver(tokenizer, trained["predictor"])
