"""Checkpoints of the release: exact both ways, and refused in one line when they are others."""

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

import convert_checkpoint
from convert_checkpoint import convert
from tvqrap.cli import UserError
from tvqrap.models import official_checkpoint as library
from tvqrap.models.assembly import SuperResolver, TextureTokenizer
from tvqrap.models.official_checkpoint import (
    read_official,
    super_resolver_from_official,
    super_resolver_to_official,
    tokenizer_from_official,
    tokenizer_to_official,
)
from tvqrap.models.paper import PaperConfig
from tvqrap.models.presets import PRESETS
from tvqrap.models.weights import load_super_resolver, load_tokenizer, save_model

LITTLE = PaperConfig(width=8, codebook_size=16, predictor_depth=2)


def little_model():
    return SuperResolver(TextureTokenizer(LITTLE), LITTLE.make_predictor()).eval()


@pytest.fixture
def state():
    return super_resolver_to_official(little_model())


def save(path, state_dict):
    torch.save({"params": {}, "params_ema": state_dict}, path)
    return path


class TestNames:
    """Of the published checkpoints, in full size: as listed in the fixtures."""

    def test_super_resolver(self, model_state, parameter_names):
        parameters = [name for name in model_state if not name.endswith(("mask", "index"))]
        assert sorted(parameters) == sorted(parameter_names["sr"])
        assert len(model_state) == 1296
        assert sum(model_state[name].numel() for name in parameters) == 75_009_110

    def test_tokenizer(self, tokenizer_state, parameter_names):
        parameters = [name for name in tokenizer_state if not name.endswith(("mask", "index"))]
        assert sorted(parameters) == sorted(parameter_names["stage1"])
        assert len(tokenizer_state) == 699
        assert sum(tokenizer_state[name].numel() for name in parameters) == 35_555_110

    def test_masks_are_of_the_stored_sizes(self, model_state):
        shapes = [v.shape for name, v in model_state.items() if name.endswith("attn_mask")]
        assert {tuple(shape) for shape in shapes} == {(16, 64, 64), (4, 64, 64)}
        elements = sum(v.numel() for n, v in model_state.items() if n.endswith(("mask", "index")))
        assert elements == 1_474_560


def test_round_trip_is_bit_exact_in_full_size(model_state, model):
    back = super_resolver_to_official(model)
    assert_close(back, model_state, rtol=0, atol=0)


def test_tokenizer_round_trip_is_bit_exact(state):
    own = {name: value for name, value in state.items() if not name.startswith(PREDICTOR)}
    assert_close(tokenizer_to_official(tokenizer_from_official(own, LITTLE)), own, rtol=0, atol=0)


PREDICTOR = ("lqencoder.", "exactor.", "blocks_fuse.", "ft_layers_low.", "idx_pred_layer_low.")


def test_loaded_tensors_are_copies(state):
    model = super_resolver_from_official(state, LITTLE)
    before = state["quantize.embedding.weight"].clone()
    with torch.no_grad():
        model.tokenizer.codes.zero_()
    assert torch.equal(state["quantize.embedding.weight"], before)


class TestStrictness:
    """Every tensor must be there, fit, and be known; the message names it."""

    def refuse(self, state, message):
        with pytest.raises(ValueError, match=message):
            super_resolver_from_official(state, LITTLE)

    def test_missing(self, state):
        del state["exactor.blocks.0.norm1.weight"]
        self.refuse(state, r"1 missing \(exactor\.blocks\.0\.norm1\.weight\)")

    def test_unknown(self, state):
        state["extra.weight"] = torch.zeros(1)
        self.refuse(state, r"must have the \d+ tensors .* 1 unknown \(extra\.weight\)")

    def test_many_are_cut_short(self, state):
        gone = [name for name in state if name.startswith("encoder.")]
        for name in gone:
            del state[name]
        self.refuse(state, rf"{len(gone)} missing \(.*, \.\.\.\)")

    def test_shape(self, state):
        state["quantize.embedding.weight"] = torch.zeros(16, 31)
        self.refuse(
            state, r"`quantize\.embedding\.weight` must have shape \(16, 32\), got \(16, 31\)"
        )

    def test_dtype(self, state):
        state["idx_pred_layer_low.1.weight"] = torch.zeros(16, 32, dtype=torch.int64)
        self.refuse(state, r"`idx_pred_layer_low\.1\.weight` must be floating point")

    @pytest.mark.parametrize("leaf", ["attn_mask", "attn.relative_position_index"])
    def test_constants_of_another_architecture(self, leaf, state):
        name = f"ft_layers_low.swin_blks.0.residual_group.blocks.1.{leaf}"
        state[name] = state[name] + 1
        self.refuse(state, "must have the values that follow from the architecture")

    def test_tokenizer_from_a_super_resolver(self, state):
        with pytest.raises(ValueError, match=r"unknown \(lqencoder"):
            tokenizer_from_official(state, LITTLE)


class TestReading:
    """Files that are not what they should be: one line, and nothing runs."""

    def test_averaged_tensors_come_first(self, state, tmp_path):
        assert_close(read_official(save(tmp_path / "x.pth", state)), state, rtol=0, atol=0)
        torch.save({"params": state}, tmp_path / "raw.pth")
        assert_close(read_official(tmp_path / "raw.pth"), state, rtol=0, atol=0)
        torch.save(state, tmp_path / "plain.pth")
        assert_close(read_official(tmp_path / "plain.pth"), state, rtol=0, atol=0)

    def test_missing_file(self, tmp_path):
        with pytest.raises(UserError, match=r"none\.pth: No such file"):
            convert(tmp_path / "none.pth", tmp_path / "x.safetensors")

    def test_truncated(self, state, tmp_path):
        path = save(tmp_path / "x.pth", state)
        path.write_bytes(path.read_bytes()[:-5000])
        with pytest.raises(UserError, match=r"x\.pth: not a readable checkpoint \(.+\)$"):
            read_official(path)

    @pytest.mark.parametrize("content", [b"", b"junk", b"\x80\x04."])
    def test_no_checkpoint(self, content, tmp_path):
        path = tmp_path / "x.pth"
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"^\S*x\.pth: [^\n]+$"):
            read_official(path)

    def test_code_is_not_executed(self, tmp_path):
        trap = tmp_path / "executed"

        class Trap:
            def __reduce__(self):
                return Path.touch, (trap,)

        path = tmp_path / "x.pth"
        torch.save({"params_ema": {"weight": Trap()}}, path)
        with pytest.raises(UserError, match=r"^[^\n]*expected tensors alone[^\n]*$"):
            read_official(path)
        path.write_bytes(pickle.dumps(Trap()))
        with pytest.raises(UserError, match=r"^[^\n]+$"):
            read_official(path)
        assert not trap.exists()

    def test_not_tensors(self, tmp_path):
        torch.save({"params_ema": {"epoch": 3}}, tmp_path / "x.pth")
        with pytest.raises(UserError, match="`epoch` must be a tensor, found int"):
            read_official(tmp_path / "x.pth")
        torch.save([1, 2], tmp_path / "x.pth")
        with pytest.raises(UserError, match="expected tensors by name, found list"):
            read_official(tmp_path / "x.pth")


class TestCommand:
    @pytest.fixture(autouse=True)
    def small(self, monkeypatch):
        monkeypatch.setattr(library, "DEFAULT_CONFIG", LITTLE)

    def test_there_and_back(self, state, tmp_path, capsys):
        source, ours, back = (tmp_path / name for name in ("a.pth", "b.safetensors", "c.pth"))
        save(source, state)
        convert_checkpoint.main([str(source), str(ours)])
        printed = capsys.readouterr().out
        assert "  generator.blocks_2.0.norm1.weight\n" in printed
        assert "  generator.blocks_3.0" not in printed
        assert f"all of {len(state)} tensors" in printed
        assert load_super_resolver(ours).config == LITTLE
        convert_checkpoint.main([str(ours), str(back)])
        assert_close(read_official(back), state, rtol=0, atol=0)
        assert torch.load(back, weights_only=True).keys() == {"params", "params_ema"}

    def test_tokenizer(self, state, tmp_path):
        own = {name: value for name, value in state.items() if not name.startswith(PREDICTOR)}
        convert(save(tmp_path / "a.pth", own), tmp_path / "b.safetensors")
        assert load_tokenizer(tmp_path / "b.safetensors").config == LITTLE
        convert(tmp_path / "b.safetensors", tmp_path / "c.pth")
        assert_close(read_official(tmp_path / "c.pth"), own, rtol=0, atol=0)

    def test_another_model_names_file_and_tensor(self, state, tmp_path):
        del state["exactor.blocks.0.norm1.weight"]
        with pytest.raises(UserError, match=r"a\.pth: .* 1 missing \(exactor\.blocks\.0\.norm1"):
            convert(save(tmp_path / "a.pth", state), tmp_path / "b.safetensors")
        assert not (tmp_path / "b.safetensors").exists()

    def test_only_the_preset_paper_goes_back(self, tmp_path):
        save_model(tmp_path / "a.safetensors", TextureTokenizer(PRESETS["tiny"]), {})
        with pytest.raises(UserError, match="not of the preset `paper`"):
            convert(tmp_path / "a.safetensors", tmp_path / "b.pth")

    def test_suffixes(self, tmp_path):
        with pytest.raises(UserError, match=r"expected a \.pth and a \.safetensors file"):
            convert(tmp_path / "a.pth", tmp_path / "b.pth")


def test_command_line_says_what_went_wrong_in_one_line(tmp_path):
    script = Path(convert_checkpoint.__file__)
    (tmp_path / "bad.pth").write_bytes(b"junk")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "bad.pth"), str(tmp_path / "x.safetensors")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {tmp_path / 'bad.pth'}: ")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "x.safetensors").exists()
