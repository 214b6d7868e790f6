# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""Weights in 8 and 4 bits: loaded, drawn with, saved and loaded again. Each library is tried where it is installed."""

from importlib.util import find_spec

import pytest
import torch
from diffusers import BitsAndBytesConfig, GGUFQuantizationConfig, QuantoConfig, TorchAoConfig

from diffusers_d2it import D2iTPipeline, bundled_checkpoint


NAMES = ("transformer", "grain_model", "vae")


@pytest.fixture
def without_a_gpu(monkeypatch):
    """bitsandbytes computes on a CPU, only diffusers asks for a GPU."""
    from diffusers.quantizers.bitsandbytes import bnb_quantizer

    for quantizer in (bnb_quantizer.BnB8BitDiffusersQuantizer, bnb_quantizer.BnB4BitDiffusersQuantizer):
        monkeypatch.setattr(quantizer, "validate_environment", lambda self, *args, **kwargs: None)
        monkeypatch.setattr(quantizer, "update_device_map", lambda self, device_map: device_map or {"": "cpu"})


def torchao(name):
    import torchao.quantization

    return TorchAoConfig(getattr(torchao.quantization, name)())


# By the package, the kind, and how far the mean pixel of an image may move
WAYS = {
    "torchao int8": ("torchao", lambda: torchao("Int8WeightOnlyConfig"), 0.02),
    "torchao int8 of activations too": ("torchao", lambda: torchao("Int8DynamicActivationInt8WeightConfig"), 0.03),
    "torchao float8": ("torchao", lambda: torchao("Float8WeightOnlyConfig"), 0.03),
    "quanto int8": ("optimum", lambda: QuantoConfig(weights_dtype="int8"), 0.01),
    "quanto int4": ("optimum", lambda: QuantoConfig(weights_dtype="int4"), 0.06),
    "quanto float8": ("optimum", lambda: QuantoConfig(weights_dtype="float8"), 0.03),
    "bitsandbytes int8": ("bitsandbytes", lambda: BitsAndBytesConfig(load_in_8bit=True), 0.02),
}


def draw(pipe):
    pipe.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "pt"}
    return pipe([207], **settings, generator=torch.Generator().manual_seed(0)).images


@pytest.fixture(scope="module")
def plain():
    return draw(D2iTPipeline.from_pretrained(bundled_checkpoint()))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("way", WAYS)
def test_integer_weights_draw_nearly_the_same_and_are_saved(plain, without_a_gpu, tmp_path, way, name):
    package, config, most = WAYS[way]
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    pipe = D2iTPipeline.from_pretrained(bundled_checkpoint())
    cls = type(getattr(pipe, name))
    model = cls.from_pretrained(bundled_checkpoint(), subfolder=name, quantization_config=config())
    pipe.register_modules(**{name: model})
    found = draw(pipe)
    assert (found - plain).abs().mean() < most
    model.save_pretrained(tmp_path)
    pipe.register_modules(**{name: cls.from_pretrained(tmp_path)})
    assert torch.equal(draw(pipe), found)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_a_gguf_file_draws_nearly_the_same(plain, tmp_path, name):
    gguf = pytest.importorskip("gguf")
    pipe = D2iTPipeline.from_pretrained(bundled_checkpoint())
    model = getattr(pipe, name)
    linear = {path for path, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "d2it")
    for path, value in model.state_dict().items():
        values, kind = value.float().numpy(), gguf.GGMLQuantizationType.Q8_0
        if path.removesuffix(".weight") in linear and values.shape[1] % 32 == 0:
            writer.add_tensor(path, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(path, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    loaded = type(model).from_single_file(
        tmp_path / "model.gguf",
        config=bundled_checkpoint(),
        subfolder=name,
        quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32),
    )
    assert any(type(parameter).__name__ == "GGUFParameter" for parameter in loaded.parameters())
    pipe.register_modules(**{name: loaded})
    assert (draw(pipe) - plain).abs().mean() < 0.02
    with pytest.raises(ValueError, match="GGUF"):
        pipe.save_pretrained(tmp_path / "saved")


@pytest.mark.filterwarnings("ignore")
def test_dynamic_quantization_of_torch(plain):
    pipe = D2iTPipeline.from_pretrained(bundled_checkpoint())
    pipe.transformer = torch.ao.quantization.quantize_dynamic(pipe.transformer, {torch.nn.Linear}, torch.qint8)
    assert 0 < (draw(pipe) - plain).abs().mean() < 0.03
