"""Whether features may serve a run, as far as manifests tell: all but the weights of the encoders. Knows no torch."""

from __future__ import annotations

from pathlib import Path

from cadtrain.config.sections import RunConfig
from cadtrain.data.features.manifest import KINDS, FeatureManifest, Kind
from cadtrain.data.manifest import Manifest
from cadtrain.errors import DataError

AGAIN = "Run `cadtrain data encode` with this run's configuration again, or take data.features out."


def refuse_others(config: RunConfig, manifest: FeatureManifest, folder: Path, dataset: Path) -> None:
    """Raise `DataError` unless the features in `folder` can be those of the prepared `dataset` for a run of `config`."""
    faults = agreement_faults(config, manifest, dataset)
    if faults:
        raise DataError("; ".join(faults), where=f"data.features {folder}", hint=AGAIN)


def agreement_faults(config: RunConfig, manifest: FeatureManifest, dataset: Path) -> list[str]:
    """What keeps features with this manifest from serving a run of `config`, apart from the weights."""
    faults = []
    digest = Manifest.read(dataset).digest
    if manifest.dataset != digest:
        faults.append(
            f"the features are of the dataset {manifest.dataset} (then in {manifest.dataset_path}), but {dataset} is {digest}"
        )
    used = used_kinds(config)
    lacking = [kind for kind in used if kind not in manifest.encoded]
    if lacking:
        faults.append(f"the curriculum shows {' and '.join(lacking)} samples, but there are no {lacking[0]} features")
    if "point" in used and "point" in manifest.encoded and manifest.num_points != config.data.num_points:
        faults.append(f"each draw has {manifest.num_points} points, but data.num_points is {config.data.num_points}")
    return faults


def used_kinds(config: RunConfig) -> list[Kind]:
    """The modalities with an encoder that some stage of the curriculum draws."""
    return [kind for kind in KINDS if any(stage.uses(kind) for stage in config.curriculum)]
