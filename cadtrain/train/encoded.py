"""Stored features in a run: what must agree before they may stand in for the encoders."""

from __future__ import annotations

from pathlib import Path

from cadtrain.config.sections import RunConfig
from cadtrain.data.features.agreement import AGAIN, refuse_others
from cadtrain.data.features.store import FeatureStore
from cadtrain.errors import DataError
from cadtrain.model.cad_mllm import CadMllm
from cadtrain.model.encoders.fingerprint import Fingerprint, fingerprint
from cadtrain.model.weights import Sharding


def open_features(config: RunConfig, folder: Path, dataset: Path) -> FeatureStore:
    """The features in `folder` for a run of `config` over the prepared `dataset`; reads no weights.

    Raises `DataError` for a folder that is damaged, of another dataset, without a kind that the curriculum shows, or with
    another number of points.
    """
    store = FeatureStore.open(folder)
    refuse_others(config, store.manifest, folder, dataset)
    return store


def check_encoders(
    store: FeatureStore, model: CadMllm, sharding: Sharding | None = None, *, after_loading: bool = False
) -> None:
    """Raise `DataError` unless the features are those of the encoders of `model`. Collective where `sharding` shares weights out.

    `after_loading` says that the weights come from a checkpoint by now.
    """
    faults = []
    for kind, encoder in (("image", model.image_encoder), ("point", model.point_encoder)):
        stored = store.manifest.encoded.get(kind)
        if encoder is None or stored is None:
            continue
        found = fingerprint(encoder, sharding)
        if found.weights != stored.weights:
            faults.append(_difference(kind, found, stored.weights, stored.encoder))
    if faults:
        source = "the checkpoint that this run begins with" if after_loading else "this run's configuration"
        raise DataError(
            f"not the features of {source}: {'; '.join(faults)}", where=f"data.features {store.folder}", hint=AGAIN
        )


def _difference(kind: str, found: Fingerprint, weights: str, description: dict[str, object]) -> str:
    """The two encoders, and where they differ if their descriptions do."""
    text = f"the {kind} encoder is {found.weights}, the features are of {weights}"
    differing = [
        f"{name} {found.description.get(name)} here, {description.get(name)} there"
        for name in sorted({*found.description, *description})
        if found.description.get(name) != description.get(name)
    ]
    return f"{text} ({', '.join(differing) or 'the same sizes, other weights'})"


def rest_encoders(model: CadMllm, *, zero_stage: int) -> None:
    """Move encoders that do not run to host memory, from where checkpoints still take their weights.

    Under ZeRO-3 they stay: there each rank holds a share, which DeepSpeed keeps on its device.
    """
    if zero_stage == 3:
        return
    for encoder in (model.image_encoder, model.point_encoder):
        if encoder is not None:
            encoder.to("cpu")
