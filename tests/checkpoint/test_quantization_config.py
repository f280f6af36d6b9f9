import copy
import json

import pytest
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import match_name
from hypothesis import given, settings
from hypothesis import strategies as st

from halve.checkpoint.quantization_config import VERSION, Layout, quantization_config
from halve.core.errors import CheckpointError, FormatError, PlanError
from halve.formats import FORMATS

PROJECTIONS = {
    "self_attn": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "mlp": ["gate_proj", "up_proj", "down_proj"],
}
LINEARS = [f"model.layers.{i}.{block}.{p}" for i in range(12) for block, ps in PROJECTIONS.items() for p in ps]


def model(choose, **others):
    """Formats of a twelve-layer model: choose(layer, projection) -> format name."""
    formats = {name: choose(int(name.split(".")[2]), name.rpartition(".")[2]) for name in LINEARS}
    return {"model.embed_tokens": "bf16", **formats, "lm_head": "bf16", **others}


def theirs(config):
    """The scheme that compressed-tensors would give each module by name."""
    parsed = QuantizationConfig.model_validate(config)
    targets = {target: scheme for scheme in parsed.config_groups.values() for target in scheme.targets}

    def scheme_of(module):
        if any(match_name(module, target) for target in parsed.ignore):
            return None
        found = (t for t in sorted(targets, key=lambda t: ("re:" in t, t)) if match_name(module, t))
        return next((targets[target] for target in found), None)

    return parsed, scheme_of


def test_a_model_without_compression_has_no_config():
    assert quantization_config(model(lambda layer, name: "bf16"), portable=True) is None
    assert Layout.from_config(None).format_of("lm_head") is None


def test_the_config_is_what_the_contract_says():
    config = quantization_config({"model.layers.0.mlp.down_proj": "int4-g32", "lm_head": "bf16"}, portable=True)
    assert config == {
        "quant_method": "compressed-tensors",
        "version": VERSION,
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "sparsity_config": {},
        "transform_config": {},
        "config_groups": {
            "group_0": {
                "format": "pack-quantized",
                "targets": ["model.layers.0.mlp.down_proj"],
                "weights": {
                    "num_bits": 4,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "group",
                    "group_size": 32,
                    "dynamic": False,
                },
                "input_activations": None,
                "output_activations": None,
            }
        },
    }


MIXES = {
    "uniform": lambda layer, name: "int4-g32",
    "first and last layers wider": lambda layer, name: "int8" if layer in (0, 1, 11) else "int4-g128",
    "by projection": lambda layer, name: "int6-g32" if name in ("down_proj", "o_proj") else "int3-g64",
    "some plain": lambda layer, name: "bf16" if layer == 10 else "int8-g32",
    "floats and integers": lambda layer, name: "fp8" if name in ("gate_proj", "up_proj") else "int2-g32",
}


@pytest.mark.parametrize("portable", [True, False])
@pytest.mark.parametrize("mix", MIXES)
def test_every_matrix_gets_its_format_from_us_and_from_compressed_tensors(mix, portable):
    formats = model(MIXES[mix])
    config = json.loads(json.dumps(quantization_config(formats, portable=portable)))
    layout = Layout.from_config(config)
    parsed, scheme_of = theirs(config)
    assert parsed.quantization_status == "compressed"
    storages = {scheme.format for scheme in parsed.config_groups.values()}
    assert parsed.format == (storages.pop() if len(storages) == 1 else "mixed-precision")
    for name, expected in formats.items():
        fmt, scheme = FORMATS[expected], scheme_of(name)
        assert layout.format_of(name) == (fmt if fmt.scaled else None)
        assert (scheme is not None) == fmt.scaled
        if scheme is not None:
            args = scheme.weights
            assert (args.num_bits, args.type, args.group_size) == (fmt.bits, fmt.kind, fmt.group_size)


@pytest.mark.parametrize("mix", MIXES)
def test_fused_names_get_the_format_of_their_members(mix):
    formats = model(MIXES[mix])
    _, scheme_of = theirs(quantization_config(formats, portable=True))
    for layer in range(12):
        for block, fused, member in (("self_attn", "qkv_proj", "q_proj"), ("mlp", "gate_up_proj", "gate_proj")):
            prefix = f"model.layers.{layer}.{block}"
            assert scheme_of(f"{prefix}.{fused}") == scheme_of(f"{prefix}.{member}")


def test_a_native_model_may_split_fused_sets_and_compress_its_table():
    formats = model(
        lambda layer, name: "int8" if name == "v_proj" else "int4-g32",
        **{"model.embed_tokens": "int8", "lm_head": "int8"},
    )
    config = quantization_config(formats, portable=False)
    layout, (_, scheme_of) = Layout.from_config(config), theirs(config)
    for name, expected in formats.items():
        assert layout.format_of(name) == FORMATS[expected]
        assert scheme_of(name).weights.num_bits == FORMATS[expected].bits
    assert layout.stored("lm_head").storage == "int-quantized"


def test_a_portable_model_may_not():
    with pytest.raises(PlanError, match=r"model.embed_tokens: other engines read embeddings in 16 bits, not int8"):
        quantization_config({"model.embed_tokens": "int8"}, portable=True)
    with pytest.raises(
        PlanError, match=r"layers.0.self_attn: other engines run q_proj, k_proj, v_proj as one qkv_proj"
    ):
        quantization_config(model(lambda layer, name: "int8" if name == "v_proj" else "int4-g32"), portable=True)


def test_an_unknown_format_is_refused():
    with pytest.raises(FormatError, match="unknown format 'int7'"):
        quantization_config({"lm_head": "int7"}, portable=False)


# Configs of others ---------------------------------------------------------------------------------------------

WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128, "dynamic": False}
FOREIGN = {  # as llm-compressor writes W4A16
    "config_groups": {
        "group_0": {
            "input_activations": None,
            "output_activations": None,
            "targets": ["Linear"],
            "weights": {
                **WEIGHTS,
                "actorder": "weight",
                "block_structure": None,
                "observer": "minmax",
                "observer_kwargs": {},
            },
        }
    },
    "format": "pack-quantized",
    "global_compression_ratio": 1.9,
    "ignore": ["lm_head", "re:.*layers\\.0\\.mlp.*"],
    "kv_cache_scheme": None,
    "quant_method": "compressed-tensors",
    "quantization_status": "compressed",
    "sparsity_config": {},
    "transform_config": {},
    "version": "0.12.2",
}


def foreign(path="", value=None):
    """FOREIGN with one key changed; path: dotted, from the group when it starts with a dot."""
    config = copy.deepcopy(FOREIGN)
    *parents, key = (f"config_groups.group_0{path}" if path.startswith(".") else path).split(".")
    place = config
    for parent in parents:
        place = place[parent]
    if path:
        place[key] = value
    return config


def test_a_class_target_with_exceptions_is_read():
    layout = Layout.from_config(FOREIGN)
    assert layout.format_of("model.layers.1.mlp.up_proj").name == "int4-g128"
    assert layout.format_of("model.layers.0.mlp.up_proj") is None
    assert layout.format_of("lm_head") is None
    assert layout.format_of("model.embed_tokens") is None  # not a Linear


def test_exact_names_go_before_patterns_and_patterns_before_classes():
    config = foreign()
    eight = {**WEIGHTS, "num_bits": 8, "group_size": None, "strategy": "channel"}
    config["config_groups"]["patterns"] = {"targets": ["re:.*down_proj$"], "weights": {**WEIGHTS, "num_bits": 6}}
    config["config_groups"]["names"] = {
        "targets": ["model.layers.1.mlp.down_proj"],
        "weights": eight,
        "format": "int-quantized",
    }
    layout = Layout.from_config(config)
    assert layout.format_of("model.layers.1.mlp.up_proj").name == "int4-g128"
    assert layout.format_of("model.layers.2.mlp.down_proj").name == "int6-g128"
    assert layout.format_of("model.layers.1.mlp.down_proj").name == "int8"
    assert layout.stored("model.layers.1.mlp.down_proj").storage == "int-quantized"


@pytest.mark.parametrize(
    ("changes", "name", "storage"),
    [
        ({"num_bits": 8, "strategy": "channel", "group_size": -1}, "int8", "pack-quantized"),
        ({"num_bits": 8, "strategy": None, "group_size": -1}, "int8", "pack-quantized"),
        ({"strategy": None}, "int4-g128", "pack-quantized"),
        ({"num_bits": 8}, "int8-g128", "int-quantized"),
        ({"num_bits": 8, "strategy": "channel", "group_size": None, "type": "float"}, "fp8", "float-quantized"),
        ({"num_bits": 8, "strategy": "channel", "group_size": None, "type": "float"}, "fp8", "naive-quantized"),
        ({"num_bits": 8, "strategy": "channel", "group_size": None}, "int8", "naive-quantized"),
    ],
)
def test_other_spellings_are_understood(changes, name, storage):
    config = foreign(".format", storage)
    config["config_groups"]["group_0"]["weights"] |= changes
    stored = Layout.from_config(config).stored("a")
    assert stored.format.name == name
    if storage != "naive-quantized":
        assert stored.storage == storage
    else:
        assert stored.storage == ("float-quantized" if name == "fp8" else "int-quantized")


def test_a_missing_ignore_list_ignores_nothing():
    assert Layout.from_config(foreign("ignore", None)).format_of("lm_head").name == "int4-g128"


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("quant_method", "gptq", "quant_method: 'gptq': only compressed-tensors is read; use the original model"),
        ("quant_method", "awq", "quant_method: 'awq'"),
        ("quant_method", None, "quant_method: None"),
        ("quantization_status", "frozen", "quantization_status: 'frozen': must be compressed"),
        ("kv_cache_scheme", {"num_bits": 8}, "kv_cache_scheme: .*: a cache quantized with stored scales"),
        ("sparsity_config", {"format": "sparse-24-bitmask"}, "sparsity_config: .*: sparse weights are not supported"),
        ("transform_config", {"config_groups": {}}, "transform_config: .*: transforms at run time"),
        ("moe_sparsity_config", {"method": "prune"}, "moe_sparsity_config: .*: sparse experts"),
        ("packing", 1, r"quantization_config: \['packing'\]: unknown keys, from a newer compressed-tensors"),
        ("config_groups", None, "config_groups: None: expected an object"),
        ("config_groups", {"W4A16": ["Linear"]}, r"config_groups.W4A16: \['Linear'\]: expected an object"),
        ("ignore", "lm_head", "ignore: 'lm_head': expected a list of names"),
        ("ignore", ["re:("], r"ignore: 're:\(': not a pattern"),
        (".targets", [1], r"group_0.targets: \[1\]: expected a list of names"),
        (".targets", None, "group_0.targets: None: expected a list of names"),
        (".speed", 1, r"group_0: \['speed'\]: unknown keys"),
        (".weights", None, "group_0.weights: None: expected an object"),
        (".weights.axis", 1, r"group_0.weights: \['axis'\]: unknown keys"),
        (".weights.symmetric", False, "weights.symmetric: False: asymmetric weights"),
        (".weights.dynamic", True, "weights.dynamic: True: weights must be quantized statically"),
        (".weights.actorder", "group", "weights.actorder: 'group': columns reordered at run time"),
        (".weights.actorder", True, "weights.actorder: True: columns reordered"),
        (".weights.block_structure", [128, 128], "weights.block_structure: .*: scales of blocks"),
        (".weights.scale_dtype", "torch.float8_e4m3fn", "weights.scale_dtype: .*no nvfp4"),
        (".weights.scale_dtype", "torch.uint8", "weights.scale_dtype: .*no mxfp4"),
        (".weights.strategy", "tensor", "weights.strategy: 'tensor': only one scale a row"),
        (".weights.strategy", "block", "weights.strategy: 'block'"),
        (".weights.strategy", "tensor_group", "weights.strategy: 'tensor_group'"),
        (".weights.strategy", "channel", "weights.group_size: 128: one scale a row"),
        (".weights.group_size", 256, r"weights: .*'group_size': 256.*: supported are fp8, int8"),
        (".weights.num_bits", 7, "weights: .*'num_bits': 7.*supported are"),
        (".weights.type", "float", "weights: .*'type': 'float'.*supported are"),
        (".format", "int-quantized", "group_0.format: 'int-quantized': int4-g128 is read from pack-quantized"),
        (".format", "naive-quantized", "group_0.format: 'naive-quantized': int4-g128 is read"),
        (".format", "marlin-24", "group_0.format: 'marlin-24'"),
        ("format", "mixed-precision", "group_0.format: 'mixed-precision'"),
        (
            ".input_activations",
            {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True},
            r"input_activations: .*: dynamic \(W8A8\) quantization of activations is not supported",
        ),
        (".input_activations", {"num_bits": 8, "dynamic": False}, "input_activations: .*: static quantization"),
        (".output_activations", {"num_bits": 8}, "output_activations: .*: static quantization"),
    ],
)
def test_what_cannot_be_run_rightly_is_refused_by_key(path, value, words):
    with pytest.raises(CheckpointError, match=f"config.json: quantization_config: .*{words}"):
        Layout.from_config(foreign(path, value))


def test_a_config_that_is_no_object_is_refused():
    with pytest.raises(CheckpointError, match="expected an object"):
        Layout.from_config(["gptq"])


def test_a_target_of_two_formats_is_refused():
    config = foreign()
    config["config_groups"]["group_1"] = {"targets": ["Linear"], "weights": {**WEIGHTS, "num_bits": 6}}
    with pytest.raises(CheckpointError, match=r"group_1.targets: 'Linear': two groups of different formats"):
        Layout.from_config(config)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
PATHS = [
    *FOREIGN,
    *(f".{key}" for key in ("targets", "weights", "input_activations", "format")),
    *(f".weights.{key}" for key in FOREIGN["config_groups"]["group_0"]["weights"]),
]


@settings(max_examples=300, deadline=None)
@given(path=st.sampled_from(PATHS), value=JSON)
def test_any_value_is_read_or_refused_and_nothing_else(path, value):
    try:
        layout = Layout.from_config(foreign(path, value))
    except CheckpointError:
        return
    layout.format_of("model.layers.0.mlp.down_proj")
