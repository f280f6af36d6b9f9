import json
import math

import ml_dtypes
import numpy as np
import pytest
import torch
from compressed_tensors.compressors.naive_quantized.base import FloatQuantizationCompressor, IntQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationConfig
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from halve.checkpoint.compressed_tensors import (
    check_finite,
    quantization_config,
    read_weight,
    weight_specs,
    weight_tensors,
)
from halve.checkpoint.header import DTYPES
from halve.checkpoint.quantization_config import Layout
from halve.checkpoint.safetensors import SINGLE, TensorReader, TensorWriter
from halve.core.errors import CheckpointError, FormatError
from halve.formats import FORMATS, Weight, pack_codes, unpack_codes
from halve.formats.base import BF16, FP8

MODULE = "model.layers.0.mlp.down_proj"
SCALED = [name for name, fmt in FORMATS.items() if fmt.scaled]
COMPRESSORS = {
    "pack-quantized": PackedQuantizationCompressor,
    "int-quantized": IntQuantizationCompressor,
    "float-quantized": FloatQuantizationCompressor,
}


def some_weight(name, shape=(5, 256), seed=0, scale_dtype=BF16):
    """Random codes over their whole range and positive scales."""
    rng, fmt = np.random.default_rng(seed), FORMATS[name]
    if fmt.kind == "float":
        codes = rng.standard_normal(shape).astype(np.float32).astype(fmt.dtype)
    else:
        half = 1 << (fmt.bits - 1)
        codes = rng.integers(-half, half, shape).astype(np.int8)
        codes.reshape(-1)[:2] = -half, half - 1
        codes = codes if fmt.bits == 8 else pack_codes(codes, fmt.bits)
    scale = (rng.random(fmt.scale_shape(shape)) + 0.01).astype(scale_dtype) if fmt.scaled else None
    return Weight(format=fmt, shape=shape, codes=codes, scale=scale)


def layout_of(name, portable=True):
    return Layout.from_config(quantization_config({MODULE: name}, portable=portable))


def to_torch(array):
    if array.dtype == BF16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    if array.dtype == FP8:
        return torch.from_numpy(array.view(np.uint8).copy()).view(torch.float8_e4m3fn)
    return torch.from_numpy(array.copy())


def save(directory, tensors):
    """Tensors of MODULE by their part's name, written as they are."""
    specs = {
        f"{MODULE}.{part}": (next(w for w, d in DTYPES.items() if d == array.dtype), array.shape)
        for part, array in tensors.items()
    }
    with TensorWriter(directory, specs) as writer:
        for part, array in tensors.items():
            writer.write(f"{MODULE}.{part}", array)


def parts(weight, portable=True):
    return {k.removeprefix(f"{MODULE}."): v for k, v in weight_tensors(MODULE, weight, portable=portable).items()}


def same(left, right):
    assert left.format == right.format
    assert left.shape == right.shape
    for a, b in ((left.codes, right.codes), (left.scale, right.scale)):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == b.dtype
            assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize("portable", [True, False])
@pytest.mark.parametrize("name", list(FORMATS))
def test_a_weight_is_read_back_bit_for_bit(tmp_path, name, portable):
    weight = some_weight(name)
    tensors = weight_tensors(MODULE, weight, portable=portable)
    specs = weight_specs(MODULE, weight.format, weight.shape, portable=portable)
    assert list(tensors) == list(specs)
    for key, (dtype, shape) in specs.items():
        assert (tensors[key].dtype, tensors[key].shape) == (DTYPES[dtype], shape)
    save(tmp_path, parts(weight, portable))
    with TensorReader(tmp_path) as reader:
        same(read_weight(reader, MODULE, layout_of(name, portable), weight.shape), weight)


@pytest.mark.parametrize("width", [32, 36, 100])
@pytest.mark.parametrize("portable", [True, False])
def test_rows_that_do_not_fill_their_words_are_read_back(tmp_path, width, portable):
    weight = some_weight("int8", (3, width - 1))
    save(tmp_path, parts(weight, portable))
    with TensorReader(tmp_path) as reader:
        same(read_weight(reader, MODULE, layout_of("int8", portable), weight.shape), weight)


@pytest.mark.parametrize("name", ["int8", "fp8", "int4-g32"])
def test_stored_bytes_go_to_kernels_without_a_copy(tmp_path, name):
    save(tmp_path, parts(some_weight(name), portable=False))
    with TensorReader(tmp_path) as reader:
        codes = read_weight(reader, MODULE, layout_of(name, portable=False), (5, 256)).codes
        part = "weight_packed" if name == "int4-g32" else "weight"
        assert np.shares_memory(codes, reader.read(f"{MODULE}.{part}"))


def test_words_are_those_written_by_hand():
    codes = np.array([[-8, -7, -6, -5, -4, -3, -2, -1] * 4], np.int8)
    four = Weight(format=FORMATS["int4-g32"], shape=(1, 32), codes=pack_codes(codes, 4), scale=np.ones((1, 1), BF16))
    assert parts(four)["weight_packed"].tolist() == [[0x76543210] * 4]
    assert parts(four)["weight_shape"].tolist() == [1, 32]
    eight = Weight(
        format=FORMATS["int8"],
        shape=(1, 5),
        codes=np.array([[-128, -1, 0, 1, 127]], np.int8),
        scale=np.ones((1, 1), BF16),
    )
    assert parts(eight)["weight_packed"].view(np.uint32).tolist() == [[0x81807F00, 0x000000FF]]
    assert parts(eight, portable=False)["weight"].tolist() == [[-128, -1, 0, 1, 127]]


@pytest.mark.parametrize("portable", [True, False])
@pytest.mark.parametrize("name", SCALED)
def test_compressed_tensors_reads_what_we_write(name, portable):
    weight = some_weight(name)
    config = QuantizationConfig.model_validate(quantization_config({MODULE: name}, portable=portable))
    scheme = config.config_groups["group_0"]
    tensors = {part: to_torch(array) for part, array in parts(weight, portable).items()}
    if "weight_packed" in tensors and weight.format.kind == "int":
        unpacked = unpack_from_int32(tensors["weight_packed"], weight.format.bits, torch.Size(weight.shape))
        np.testing.assert_array_equal(unpacked.numpy(), weight.unpacked_codes())
    # In float32, as we define it: their own result has the type of the scale, bf16, and is rounded to it.
    tensors["weight_scale"] = tensors["weight_scale"].float()
    theirs = COMPRESSORS[scheme.format].decompress(tensors, scheme)["weight"]
    np.testing.assert_array_equal(theirs.float().numpy(), weight.dequantize())


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", SCALED)
def test_we_read_what_compressed_tensors_writes(tmp_path, name, scale_dtype):
    fmt, shape = FORMATS[name], (6, 256)
    config = quantization_config({MODULE: name}, portable=True)
    scheme = QuantizationConfig.model_validate(config).config_groups["group_0"]
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(shape, generator=generator)
    largest = 448 if fmt.kind == "float" else (1 << (fmt.bits - 1)) - 0.5
    scale = (weight.reshape(*fmt.scale_shape(shape), -1).abs().amax(-1) / largest).to(scale_dtype)
    theirs = COMPRESSORS[scheme.format].compress({"weight": weight, "weight_scale": scale}, scheme)
    arrays = {
        key: value.view(torch.int16).numpy().view(BF16)
        if value.dtype == torch.bfloat16
        else value.view(torch.uint8).numpy().view(FP8)
        if value.dtype == torch.float8_e4m3fn
        else value.numpy()
        for key, value in theirs.items()
    }
    save(tmp_path, arrays)
    with TensorReader(tmp_path) as reader:
        ours = read_weight(reader, MODULE, Layout.from_config(config), shape)
    assert str(ours.scale.dtype) == str(scale_dtype).removeprefix("torch.")
    expected = COMPRESSORS[scheme.format].decompress({**theirs, "weight_scale": scale.float()}, scheme)["weight"]
    np.testing.assert_array_equal(ours.dequantize(), expected.float().numpy())


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_our_packing_and_theirs_are_one(bits):
    half = 1 << (bits - 1)
    codes = np.random.default_rng(bits).integers(-half, half, (4, 100)).astype(np.int8)
    theirs = pack_to_int32(torch.from_numpy(codes), bits).numpy().view(np.uint32)
    np.testing.assert_array_equal(pack_codes(codes, bits), theirs)
    np.testing.assert_array_equal(unpack_codes(theirs, bits, 100), codes)


# What is refused -----------------------------------------------------------------------------------------------


def test_an_expert_axis_is_not_written_yet():
    weight = some_weight("int8", (2, 3, 32))
    with pytest.raises(FormatError, match=r"down_proj: shape \[2, 3, 32\]: int8 is written for matrices"):
        weight_tensors(MODULE, weight, portable=True)


def test_a_group_that_does_not_divide_is_not_written():
    with pytest.raises(FormatError, match="int4-g32: group_size 32 does not divide in_features 40"):
        weight_specs(MODULE, FORMATS["int4-g32"], (4, 40), portable=True)


def test_scales_of_others_are_written_only_where_bf16_holds_them():
    fits = some_weight("int8", scale_dtype=np.float32)
    fits.scale[:] = 0.375
    assert parts(fits)["weight_scale"].dtype == BF16
    fits.scale[0] = 0.1
    with pytest.raises(FormatError, match="scales in float32 do not fit bf16 exactly; compress the original"):
        parts(fits)


def test_a_plain_expert_tensor_is_written_and_read(tmp_path):
    weight = some_weight("bf16", (2, 3, 4))
    save(tmp_path, parts(weight))
    with TensorReader(tmp_path) as reader:
        same(read_weight(reader, MODULE, Layout(), (2, 3, 4)), weight)


def refused(tmp_path, tensors, layout, words, shape=(5, 256)):
    save(tmp_path, tensors)
    with TensorReader(tmp_path) as reader, pytest.raises(CheckpointError, match=words):
        read_weight(reader, MODULE, layout, shape)


PACKED = ("weight_packed", "weight_scale", "weight_shape")


@pytest.mark.parametrize("part", PACKED)
def test_a_missing_part_is_named(tmp_path, part):
    tensors = parts(some_weight("int4-g32"))
    del tensors[part]
    refused(tmp_path, tensors, layout_of("int4-g32"), f"tensor '{MODULE}.{part}': no such tensor")


@pytest.mark.parametrize(
    ("name", "part", "change", "words"),
    [
        ("int4-g32", "weight_packed", lambda a: a.astype(np.int64), "weight_packed: I64; int4-g32 needs I32"),
        (
            "int4-g32",
            "weight_packed",
            lambda a: a[:, :-1],
            r"weight_packed: shape \[5, 31\]; the model needs \[5, 32\]",
        ),
        ("int4-g32", "weight_packed", lambda a: a[:-1], r"weight_packed: shape \[4, 32\]; the model needs \[5, 32\]"),
        ("int4-g32", "weight_scale", lambda a: a.astype(np.float64), "weight_scale: F64; .* needs BF16 or F16 or F32"),
        ("int4-g32", "weight_scale", lambda a: a[:, :1], r"weight_scale: shape \[5, 1\]; the model needs \[5, 8\]"),
        ("int4-g32", "weight_shape", lambda a: a + 1, r"weight_shape: holds \[6, 257\]; the model needs \[5, 256\]"),
        ("int4-g32", "weight_shape", lambda a: a.astype(np.int32), "weight_shape: I32; int4-g32 needs I64"),
        ("int4-g32", "weight_shape", lambda a: a[:1], r"weight_shape: shape \[1\]; the model needs \[2\]"),
        ("fp8", "weight", lambda a: a.astype(BF16), "weight: BF16; fp8 needs F8_E4M3"),
        ("fp8", "weight", lambda a: np.where(a == a[1, 2], FP8.type("nan"), a), r"weight: nan at \[\d, \d+\]"),
        (
            "int8",
            "weight_scale",
            lambda a: a * BF16.type("nan"),
            r"weight_scale: nan at \[0, 0\]; weights must be finite",
        ),
        ("int8", "weight_scale", lambda a: a / BF16.type(0), r"weight_scale: inf at \[0, 0\]"),
        ("fp8", "weight_scale", lambda a: a * BF16.type(0), r"weight_scale: 0 at \[0, 0\] over codes that aren't zero"),
        ("int3-g64", "weight_scale", lambda a: a * np.array([1, 1, 0, 1], BF16), r"0 at \[0, 2\] over codes"),
    ],
)
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_a_part_that_does_not_fit_is_named(tmp_path, name, part, change, words):
    tensors = parts(some_weight(name))
    tensors[part] = change(tensors[part])
    refused(tmp_path, tensors, layout_of(name), words)


@pytest.mark.parametrize("name", ["int8", "int8-g32", "int6-g32", "int4-g32", "fp8"])
def test_a_zero_scale_over_zeros_is_a_pruned_group(tmp_path, name):
    weight = some_weight(name)
    codes = weight.unpacked_codes().copy()
    codes[3] = 0
    packed = codes if weight.format.bits == 8 else pack_codes(codes, weight.format.bits)
    weight.scale[3] = 0
    zeroed = Weight(format=weight.format, shape=weight.shape, codes=packed, scale=weight.scale)
    save(tmp_path, parts(zeroed))
    with TensorReader(tmp_path) as reader:
        same(read_weight(reader, MODULE, layout_of(name), weight.shape), zeroed)


@pytest.mark.parametrize("name", ["int8", "int4-g32", "fp8"])
def test_scales_below_zero_are_read_as_they_are(tmp_path, name):
    """AutoRound writes them."""
    weight = some_weight(name)
    weight.scale[::2] = -weight.scale[::2]
    save(tmp_path, parts(weight))
    with TensorReader(tmp_path) as reader:
        same(read_weight(reader, MODULE, layout_of(name), weight.shape), weight)


@pytest.mark.parametrize("part", ["weight_zero_point", "weight_g_idx"])
def test_asymmetric_and_reordered_files_are_refused(tmp_path, part):
    tensors = {**parts(some_weight("int4-g32")), part: np.zeros(4, np.int32)}
    refused(tmp_path, tensors, layout_of("int4-g32"), f"{part}: zero points and reordered columns are not supported")


@pytest.mark.parametrize("bits", [3, 5, 6])
def test_the_padded_words_of_old_files_are_recognised(tmp_path, bits):
    words = math.ceil(256 / (32 // bits))
    tensors = {**parts(some_weight(f"int{bits}-g32")), "weight_packed": np.zeros((5, words), np.int32)}
    refused(
        tmp_path, tensors, layout_of(f"int{bits}-g32"), f"rows of {words} words .* before June 2026; only dense rows"
    )


def test_a_shape_that_the_format_cannot_hold_is_refused(tmp_path):
    tensors = parts(some_weight("int4-g32"))
    refused(tmp_path, tensors, layout_of("int4-g32"), "int4-g32: group_size 32 does not divide in_features 40", (5, 40))


def test_an_expert_axis_is_not_read_yet(tmp_path):
    tensors = parts(some_weight("int4-g32"))
    refused(
        tmp_path, tensors, layout_of("int4-g32"), r"shape \[1, 5, 256\]: int4-g32 is read for matrices", (1, 5, 256)
    )


def test_compressed_tensors_that_the_config_does_not_name_are_refused(tmp_path):
    refused(
        tmp_path, parts(some_weight("int4-g32")), Layout(), "weight_packed: a compressed matrix that .* does not name"
    )


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_codes_that_the_config_does_not_name_are_refused(tmp_path, name):
    refused(
        tmp_path, parts(some_weight(name), portable=False), Layout(), "weight: (I8|F8_E4M3), and .* does not name it"
    )


def test_a_plain_matrix_of_another_shape_is_refused(tmp_path):
    refused(tmp_path, parts(some_weight("bf16")), Layout(), r"shape \[5, 256\]; the model needs \[256, 5\]", (256, 5))


@pytest.mark.parametrize("name", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_plain_matrix_with_nan_or_infinity_is_refused(tmp_path, name, value):
    weight = some_weight(name)
    weight.codes[3, 7] = float(value)
    refused(tmp_path, parts(weight), Layout(), rf"down_proj.weight: {value} at \[3, 7\]; weights must be finite")


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, ml_dtypes.float8_e4m3fn])
def test_every_bit_pattern_is_finite_or_refused(dtype):
    width = np.dtype(dtype).itemsize
    values = np.arange(256**width, dtype=f"u{width}").view(dtype)
    finite = np.isfinite(values.astype(np.float32))
    check_finite("x", values[finite])
    for value in values[~finite][:: 1 + len(values[~finite]) // 50]:
        with pytest.raises(CheckpointError, match=r"x: (nan|inf|-inf) at \[1\]"):
            check_finite("x", np.array([0, value], dtype))


def test_the_place_of_a_bad_value_is_found_beyond_the_first_chunk():
    values = np.zeros((700, 1000), BF16)
    values[699, 123] = float("nan")
    with pytest.raises(CheckpointError, match=r"nan at \[699, 123\]"):
        check_finite("x", values)
    check_finite("x", values[:0])


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), name=st.sampled_from(["int4-g32", "int8", "int3-g32", "fp8"]), portable=st.booleans())
def test_damaged_files_give_numbers_or_a_refusal(tmp_path, data, name, portable):
    (tmp_path / SINGLE).unlink(missing_ok=True)
    save(tmp_path, parts(some_weight(name, (2, 32)), portable))
    raw = bytearray((tmp_path / SINGLE).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    (tmp_path / SINGLE).write_bytes(raw)
    try:
        with TensorReader(tmp_path) as reader:
            weight = read_weight(reader, MODULE, layout_of(name, portable), (2, 32))
    except CheckpointError:
        return
    with np.errstate(over="ignore"):  # a damaged scale may be huge and still a number
        assert not np.isnan(weight.dequantize()).any()


@pytest.mark.parametrize("portable", [True, False])
def test_transformers_opens_a_model_of_mixed_formats(tmp_path, portable):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=96,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    original = transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()
    state = original.state_dict()
    kinds = {"gate_proj": "int4-g32", "up_proj": "int4-g32", "down_proj": "int3-g64", "o_proj": "fp8"}
    linears = [name for name, module in original.named_modules() if isinstance(module, torch.nn.Linear)]
    formats = {name: "bf16" if name == "lm_head" else kinds.get(name.rpartition(".")[2], "int8") for name in linears}
    tensors, shapes = {}, {}
    for name, value in state.items():
        module = name.removesuffix(".weight")
        if formats.get(module, "bf16") == "bf16":
            tensors[name] = value.view(torch.int16).numpy().view(BF16)
        else:
            weight = some_weight(formats[module], tuple(value.shape), seed=len(name))
            tensors |= weight_tensors(module, weight, portable=portable)
            state[name] = torch.from_numpy(weight.dequantize())
    shapes = {k: (next(w for w, d in DTYPES.items() if d == v.dtype), v.shape) for k, v in tensors.items()}
    with TensorWriter(tmp_path, shapes) as writer:
        for name, array in tensors.items():
            writer.write(name, array)
    raw = {**config.to_dict(), "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    raw["quantization_config"] = quantization_config(formats, portable=portable)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    loaded(input_ids=torch.tensor([[1, 2, 3]]))  # decompresses on the first call
    for name, value in loaded.state_dict().items():
        if name in state:
            torch.testing.assert_close(value, state[name].to(torch.bfloat16), rtol=0, atol=0)
