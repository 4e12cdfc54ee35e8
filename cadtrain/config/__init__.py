"""What a run is, read from YAML, and what follows from it by arithmetic alone.

sections            the run configuration: frozen pydantic models; docstrings are help and documentation
load                a file or a preset, `--set` on top, every fault at once with its line
yaml_source, overrides, faults, schema      what `load` is made of
batch_plan          samples and durations to optimizer steps
deepspeed_config    the DeepSpeed JSON of a run; `deepspeed_schema` mirrors DeepSpeed's keys,
                    `deepspeed_lint` reads other people's files, `deepspeed_reasons` explains
document            docs/config.md
presets/            the YAML files that configs/ shows
"""
