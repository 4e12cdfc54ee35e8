"""LoRA adapters as PEFT writes them, for the plain language model, and all else that was learnt beside them.

    adapter_config.json  adapter_model.safetensors     for `PeftModel.from_pretrained(language_model, folder)`
    projectors.safetensors                             projectors, encoders that are in no file elsewhere, rows of the codec's tokens
    preprocessor_config.json, the tokenizer's files    how inputs are made

Names in the first drop `language.` and the adapter's own name `default`; those in the second are the whole model's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import torch

from cadtrain.checkpoint.weight_files import Entry, write_safetensors
from cadtrain.config.sections import LoraConfig, RunConfig
from cadtrain.convert.description import preprocessing, run_tokenizer
from cadtrain.convert.model_folder import PREPROCESSOR
from cadtrain.convert.placing import placed_folder
from cadtrain.convert.targets import PIECE_VALUES, Job, Result, Watch, entry_of, folder_bytes, target_dtype
from cadtrain.errors import UsageError

ADAPTER, REST = "adapter_model.safetensors", "projectors.safetensors"
_LANGUAGE, _ROWS = "language.", ".added_rows.weight"
_LORA = re.compile(r"^language\.(.+\.lora_[AB])\.default\.weight$")


def write_peft_folder(job: Job) -> Result:
    """Write `job.target` as a PEFT folder. Raises `UsageError` for a run without adapters."""
    lora = job.config.model.language.lora if job.config is not None else None
    if job.config is None or lora is None:
        reason = "has no config.yaml beside it" if job.config is None else "was trained without LoRA"
        raise UsageError(
            f"the checkpoint {reason}, so there is no adapter to write.",
            where="--adapter",
            hint="Leave --adapter away to have all weights.",
        )
    adapters = [
        entry_of(job, name, written_as=f"base_model.model.{match[1]}.weight")
        for name in job.weights
        if (match := _LORA.match(name))
    ]
    rest = [entry for name in job.weights for entry in _beside(job, job.config, name)]
    watch = Watch(job, [*adapters, *rest])
    with placed_folder(job.target) as folder:
        write_safetensors(folder / ADAPTER, adapters, written=watch.written)
        files = [folder / ADAPTER]
        if rest:
            write_safetensors(folder / REST, rest, written=watch.written)
            files.append(folder / REST)
        _describe_adapter(folder, lora, job.config)
        facts = json.dumps(preprocessing(job.config), indent=2)
        (folder / PREPROCESSOR).write_text(facts + "\n", encoding="utf-8")
        run_tokenizer(job.config).save_pretrained(folder)
        watch.read_back(files)
    return watch.result(folder_bytes(job.target), _notes(job.config, rest))


def _beside(job: Job, config: RunConfig, name: str) -> list[Entry]:
    """The entry of a weight that is neither an adapter nor to be had from where the run had it; none for others."""
    if name.startswith(_LANGUAGE):
        is_rows = name.endswith(_ROWS) and job.weights.info[name].alias_of is None
        return [_new_rows(job, name)] if is_rows else []
    section = {"image_encoder": config.model.image, "point_encoder": config.model.point}.get(name.split(".", 1)[0])
    is_elsewhere = section is not None and section.pretrained is not None and not section.trainable
    return [] if is_elsewhere else [entry_of(job, name)]


def _new_rows(job: Job, name: str) -> Entry:
    """The rows of the codec's tokens as they are used: what stands in the base, which no file elsewhere has, plus what was learnt."""
    stem, weights = name.removesuffix(_ROWS), job.weights
    base = weights.info[f"{stem}.base_layer.weight"]
    height, width = weights.info[name].shape
    first = base.shape[0] - height

    def pieces() -> Iterator[torch.Tensor]:
        learnt, start = weights[name].float(), 0
        for piece in weights.pieces(base.name, width * max(1, PIECE_VALUES // width)):
            block = piece.float().view(-1, width)
            end = start + block.shape[0]
            if end > first:
                at = max(start, first)
                yield block[at - start :] + learnt[at - first : end - first]
            start = end

    return Entry(f"{stem}.new_rows.weight", torch.Size([height, width]), target_dtype(job, name), pieces)


def _describe_adapter(folder: Path, lora: LoraConfig, config: RunConfig) -> None:
    """Write `adapter_config.json` as peft itself does for these settings."""
    import peft

    settings = peft.LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=list(lora.target_modules), bias="none",
        task_type="CAUSAL_LM", base_model_name_or_path=config.model.language.pretrained, inference_mode=True,
    )  # fmt: skip
    settings.save_pretrained(folder)


def _notes(config: RunConfig, rest: list[Entry]) -> tuple[str, ...]:
    notes = []
    if rest:
        parts = sorted({entry.name.split(".", 1)[0] for entry in rest})
        count = sum(entry.shape.numel() for entry in rest)
        notes.append(f"{count:,} learnt weights that are no adapter ({', '.join(parts)}) are in {REST}.")
    if rows := [entry for entry in rest if entry.name.endswith("new_rows.weight")]:
        count = rows[0].shape[0]
        notes.append(
            f"The codec's {count} tokens have rows of their own, new_rows in {REST}: the last of the grown embedding."
        )
    if config.model.language.pretrained is None:
        notes.append(
            "The language model was built from this run's configuration: convert a whole folder to keep its base."
        )
    return tuple(notes)
