"""Model files: exact round trips, and one clear line for files that are not ours."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import to_float16
from tests.examples.test_model import CONFIGS
from tvqrap.cli import UserError, run
from tvqrap.models.assembly import SuperResolver, TextureTokenizer
from tvqrap.models.weights import load_super_resolver, load_tokenizer, read_notes, save_model


@pytest.fixture(params=["regressed", "paper"])
def model(request):
    config = CONFIGS[request.param]
    return SuperResolver(TextureTokenizer(config), config.make_predictor()).eval()


def test_round_trip_is_exact(model, tmp_path):
    path = tmp_path / "model.safetensors"
    save_model(path, model, {"stage": "predictor"})
    loaded = load_super_resolver(path)
    assert loaded.config == model.config
    assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert read_notes(path)["stage"] == "predictor"


def test_tokenizer_alone(tmp_path):
    tokenizer = TextureTokenizer(CONFIGS["lowres"])
    path = tmp_path / "tokenizer.safetensors"
    save_model(path, tokenizer, {})
    assert_close(load_tokenizer(path).state_dict(), tokenizer.state_dict(), rtol=0, atol=0)
    assert load_super_resolver(path).predictor is None


def test_float16_weights_are_read_as_float32(model, tmp_path, capsys):
    path, target = tmp_path / "model.safetensors", tmp_path / "new" / "half.safetensors"
    save_model(path, model, {"stage": "rap"})
    assert run(lambda: to_float16.main([str(path), str(target)])) == 0
    assert capsys.readouterr().out.startswith(f"{target}: ")
    assert read_notes(target) == read_notes(path)
    assert {value.dtype for value in load_file(target).values()} == {torch.float16}
    assert target.stat().st_size < 0.6 * path.stat().st_size
    loaded = load_super_resolver(target).state_dict()
    rounded = {name: value.half().float() for name, value in model.state_dict().items()}
    assert_close(loaded, rounded, rtol=0, atol=0)


def test_weights_say_how_much_texture_is_added(model, tmp_path, capsys):
    path, target = tmp_path / "model.safetensors", tmp_path / "half.safetensors"
    save_model(path, model, {})
    assert load_super_resolver(path).texture_strength == 1
    to_float16.main([str(path), str(target), "--texture", "0.25"])
    assert load_super_resolver(target).texture_strength == 0.25
    # Files had no such note at first.
    header = read_notes(path)
    del header["texture"]
    save_file(load_file(path), path, metadata=header)
    assert load_super_resolver(path).texture_strength == 1
    save_model(path, model.tokenizer, {})
    with pytest.raises(UserError, match="holds a tokenizer alone, which predicts no texture"):
        to_float16.main([str(path), str(target), "--texture", "0.25"])


def test_what_float16_cannot_hold_is_refused(tmp_path, capsys):
    path, target = tmp_path / "model.safetensors", tmp_path / "half.safetensors"
    tokenizer = TextureTokenizer(CONFIGS["lowres"])
    with torch.no_grad():
        next(tokenizer.parameters()).view(-1)[0] = 7e4
    save_model(path, tokenizer, {})
    assert run(lambda: to_float16.main([str(path), str(target)])) == 1
    assert capsys.readouterr().err == (
        f"error: {path}: has a weight of 70000, which float16 cannot hold\n"
    )
    assert not target.exists()


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"no such weights; expected a \.safetensors file"):
        load_super_resolver(tmp_path / "none.safetensors")


@pytest.mark.parametrize("content", [b"", b"\x00" * 100, b"\x80\x04pickle"])
def test_not_safetensors(content, tmp_path):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match="not a readable safetensors file"):
        load_super_resolver(path)


def test_truncated(model, tmp_path):
    path = tmp_path / "model.safetensors"
    save_model(path, model, {})
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(UserError, match="not a readable safetensors file"):
        load_super_resolver(path)


def test_foreign_file(tmp_path):
    path = tmp_path / "foreign.safetensors"
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(UserError, match=r"expected weights of format .*, found a safetensors file"):
        load_super_resolver(path)


def test_tensors_that_do_not_fit(model, tmp_path):
    path = tmp_path / "model.safetensors"
    save_model(path, model, {})
    tensors, header = load_file(path), read_notes(path)
    del tensors["predictor.head.head.weight"]
    save_file(tensors, path, metadata=header)
    with pytest.raises(UserError, match="tensors do not fit their configuration"):
        load_super_resolver(path)


def test_regressed_tokenizer_alone_cannot_upscale(tmp_path):
    path = tmp_path / "tokenizer.safetensors"
    save_model(path, TextureTokenizer(CONFIGS["regressed"]), {})
    with pytest.raises(UserError, match="holds a tokenizer alone"):
        load_super_resolver(path)
