"""A compressor of other people on one model, by the Python of its own environment; `methods_against_peers.py` calls it.

    PYTHON benchmarks/run_peer.py JOB.json

JOB.json: peer (a name of PEERS), model (a directory), windows (an .npz of int32 token ids, a window each), bits,
group_size, skip (modules that stay as they are), seed, out (a directory that is not there yet). Nothing of Halve is
imported. `PYTHON benchmarks/run_peer.py PEER` prints the version of the package, and fails where there is none.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from typing import Any

PACKAGES = {"llm-compressor": "llmcompressor", "auto-round": "auto-round", "gptqmodel": "gptqmodel"}


def llm_compressor_gptq(job: dict[str, Any], windows: list[Any], **arguments: Any) -> None:
    """GPTQ with its defaults: static activation order, 1 % damping, scales by the observer that is named."""
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    weights = {"num_bits": job["bits"], "type": "int", "symmetric": True, "strategy": "group", **arguments}
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    oneshot(
        model=model,
        tokenizer=AutoTokenizer.from_pretrained(job["model"]),
        dataset=Dataset.from_list([{"input_ids": w.tolist(), "attention_mask": [1] * len(w)} for w in windows]),
        recipe=GPTQModifier(
            config_groups={"group_0": {"targets": ["Linear"], "weights": weights | {"group_size": job["group_size"]}}},
            ignore=["lm_head", *job["skip"]],
        ),
        max_seq_length=max(map(len, windows)),
        num_calibration_samples=len(windows),
        shuffle_calibration_samples=False,
    )
    model.save_pretrained(job["out"], save_compressed=True)


def llm_compressor_gptq_mse(job: dict[str, Any], windows: list[Any]) -> None:
    """The same with scales of least squared error."""
    llm_compressor_gptq(job, windows, observer="mse")


def auto_round(job: dict[str, Any], windows: list[Any], iters: int = 200) -> None:
    """AutoRound with its defaults: 200 steps of sign gradient a block. It takes windows of one length alone."""
    import numpy as np
    import torch
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    length = max(map(len, windows))
    whole = np.concatenate(windows)
    whole = torch.from_numpy(whole[: len(whole) // length * length].astype(np.int64)).view(-1, length)
    tuned = AutoRound(
        AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32),
        AutoTokenizer.from_pretrained(job["model"]),
        scheme=f"W{job['bits']}A16",
        group_size=job["group_size"],
        sym=True,
        iters=iters,
        dataset=torch.utils.data.DataLoader([{"input_ids": w} for w in whole], batch_size=8),
        nsamples=len(whole),
        seqlen=length,
        seed=job["seed"],
        layer_config={name: {"bits": 16} for name in job["skip"]},
        device_map="cpu",
        enable_torch_compile=False,
    )
    tuned.quantize_and_save(job["out"], format="llm_compressor")


def auto_round_rtn(job: dict[str, Any], windows: list[Any]) -> None:
    """AutoRound without steps: rounding to nearest with scales searched (RTN-opt)."""
    auto_round(job, windows, iters=0)


def gptqmodel(job: dict[str, Any], windows: list[Any]) -> None:
    """GPTQModel's GPTQ with its defaults, without activation order in the file."""
    from gptqmodel import GPTQModel, QuantizeConfig

    config = QuantizeConfig(bits=job["bits"], group_size=job["group_size"], sym=True, desc_act=False)
    model = GPTQModel.load(job["model"], config)
    model.quantize([{"input_ids": w.tolist(), "attention_mask": [1] * len(w)} for w in windows], batch_size=1)
    model.save(job["out"])


PEERS = {
    "llm-compressor GPTQ": ("llm-compressor", llm_compressor_gptq),
    "llm-compressor GPTQ, mse": ("llm-compressor", llm_compressor_gptq_mse),
    "AutoRound RTN-opt": ("auto-round", auto_round_rtn),
    "AutoRound": ("auto-round", auto_round),
    "GPTQModel GPTQ": ("gptqmodel", gptqmodel),
}


def main() -> None:
    """Print a version, or run a job."""
    sys.path.pop(0)  # the scripts beside this one have names that packages look for, such as `kernels`
    if sys.argv[1] in PEERS:
        print(importlib.metadata.version(PACKAGES[PEERS[sys.argv[1]][0]]))
        return
    import numpy as np
    import torch

    with open(sys.argv[1], encoding="utf-8") as stream:
        job = json.load(stream)
    torch.manual_seed(job["seed"])
    with np.load(job["windows"]) as stored:
        windows = [stored[name] for name in stored.files]
    PEERS[job["peer"]][1](job, windows)


if __name__ == "__main__":
    main()
