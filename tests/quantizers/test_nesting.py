"""What goes inside what: contradictory layouts are refused when they are built."""

import pytest
from torch import nn

from vqprior import (
    ChannelsFirst,
    MultiScaleQuantizer,
    ProjectedQuantizer,
    RequireFinite,
    SelfUpdating,
    TextureQuantizer,
    VectorQuantizer,
)

WRAPPERS = {
    "channel-first": ChannelsFirst,
    "require-finite": RequireFinite,
    "self-updating": SelfUpdating,
    "texture": TextureQuantizer,
    "projected": lambda quantizer: ProjectedQuantizer(quantizer, nn.Identity(), nn.Identity()),
    "multi-scale": lambda quantizer: MultiScaleQuantizer(quantizer, (1, 2)),
}
every_wrapper = pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())


@every_wrapper
@pytest.mark.parametrize(
    "inner", [TextureQuantizer(VectorQuantizer(4, 16)), nn.Linear(4, 4)], ids=["texture", "linear"]
)
def test_only_quantizers_go_inside(wrap, inner):
    message = (
        rf"^`quantizer` must be a quantizer, got {type(inner).__name__}\. Only the outermost "
        r"quantizer can be a `TextureQuantizer`\.$"
    )
    with pytest.raises(TypeError, match=message):
        wrap(inner)


@pytest.mark.parametrize("name", ["channel-first", "require-finite", "projected", "multi-scale"])
@pytest.mark.parametrize("outer", [lambda q: q, SelfUpdating], ids=["bare", "wrapped"])
def test_channel_first_goes_outside(name, outer):
    inner = outer(ChannelsFirst(VectorQuantizer(4, 16)))
    message = (
        rf"^`quantizer` must have features last, got {type(inner).__name__}\. Wrap the outer "
        r"quantizer in `ChannelsFirst` instead\.$"
    )
    with pytest.raises(ValueError, match=message):
        WRAPPERS[name](inner)


def test_layouts_are_declared():
    plain = VectorQuantizer(4, 16)
    assert (plain.features_last, plain.has_index_per_token) == (True, True)
    scales = SelfUpdating(MultiScaleQuantizer(plain, (1, 2)))
    assert (scales.features_last, scales.has_index_per_token) == (True, False)
    assert not SelfUpdating(ChannelsFirst(plain)).features_last
    assert TextureQuantizer(ChannelsFirst(plain)).features_last is False
