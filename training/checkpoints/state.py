"""A run's state on disk: optimiser, random generators, settings."""

import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ...data.words import some
from .files import CheckpointError, load_tensors, read_json, write_json

OPTIMIZER_TENSORS_NAME = "optimizer.safetensors"
OPTIMIZER_GROUPS_NAME = "optimizer.json"


def save_optimizer(
    folder: str | os.PathLike[str], optimizer: torch.optim.Optimizer, parameter_names: list[str]
) -> None:
    """Write an optimiser's state as `optimizer.safetensors` and its groups' hyper-parameters as `optimizer.json`.

    Args:
        optimizer: one whose state is tensors and whose hyper-parameters are plain numbers, as AdamW's are.
        parameter_names: a name for each parameter, in the order of the optimiser's groups.
    """
    state_dict = optimizer.state_dict()
    tensors = {
        f"{parameter_names[index]}.{key}": value.detach().cpu().contiguous()
        for index, state in state_dict["state"].items()
        for key, value in state.items()
    }
    groups = [
        {**group, "params": [parameter_names[index] for index in group["params"]]}
        for group in state_dict["param_groups"]
    ]
    save_file(tensors, Path(folder) / OPTIMIZER_TENSORS_NAME)
    write_json(Path(folder) / OPTIMIZER_GROUPS_NAME, {"param_groups": groups})


def load_optimizer(
    folder: str | os.PathLike[str], optimizer: torch.optim.Optimizer, parameter_names: list[str]
) -> None:
    """Restore, bit for bit, what `save_optimizer` wrote, onto the devices of the optimiser's parameters.

    Raises:
        CheckpointError: a file is unreadable, or the parameters differ from the saved ones in name, group or shape.
    """
    tensors = load_tensors(Path(folder) / OPTIMIZER_TENSORS_NAME)
    groups = read_json(Path(folder) / OPTIMIZER_GROUPS_NAME)["param_groups"]
    _check_same_parameters(folder, groups, tensors, optimizer, parameter_names)

    index_of = {name: index for index, name in enumerate(parameter_names)}
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        parameter_name, _, key = name.rpartition(".")
        state.setdefault(index_of[parameter_name], {})[key] = tensor
    for group in groups:
        # JSON has no tuples; `betas` was one.
        group.update({key: tuple(value) for key, value in group.items() if isinstance(value, list)})
        group["params"] = [index_of[name] for name in group["params"]]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _check_same_parameters(
    folder: str | os.PathLike[str],
    groups: list[dict[str, Any]],
    tensors: dict[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    parameter_names: list[str],
) -> None:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    shapes = {name: parameter.shape for name, parameter in zip(parameter_names, parameters, strict=True)}
    remaining = iter(parameter_names)
    live_groups = [[next(remaining) for _ in group["params"]] for group in optimizer.param_groups]
    saved_groups = [group["params"] for group in groups]
    saved_names = {name for group in saved_groups for name in group} | {key.rpartition(".")[0] for key in tensors}

    differences = [f"{name} is only in the checkpoint" for name in sorted(saved_names - shapes.keys())]
    differences += [f"{name} is only in the model" for name in sorted(shapes.keys() - saved_names)]
    for key, tensor in tensors.items():
        shape = shapes.get(key.rpartition(".")[0])
        # The step count is a scalar beside parameters of any shape.
        if shape is not None and tensor.ndim > 0 and tensor.shape != shape:
            differences.append(f"{key} is {tuple(tensor.shape)}, its parameter {tuple(shape)}")
    if not differences and saved_groups != live_groups:
        differences = ["the parameter groups are cut differently"]
    if differences:
        shown = "; ".join(differences[:5]) + (f"; and {len(differences) - 5} more" if len(differences) > 5 else "")
        raise CheckpointError(
            f"{folder} is a checkpoint of another model: {shown}. Resume with the config that the checkpoint holds"
        )


# settings that older checkpoints do not name, as all runs had them then
ONCE_FIXED = {
    "model_type": "mimae",
    "crop_interpolation": "bicubic",
    "schedule.start": 0.0,
    "drop_path_rate": 0.0,
    "classifier_pooling": "mean",
    "mi_ramp_steps": 0,
}


def refuse_other_settings(saved: dict[str, Any], current: dict[str, Any]) -> None:
    """A resumed run must have the settings that its result follows from.

    Raises:
        ValueError: names each key that differs, with both values.
    """
    saved, current = {**ONCE_FIXED, **saved}, {**ONCE_FIXED, **current}
    if saved["model_type"] != current["model_type"]:
        raise ValueError(
            f"the checkpoint's run trains a {saved['model_type']!r}, these flags a {current['model_type']!r}: give "
            "the run's own recipe with --config"
        )
    missing = object()
    keys = [k for k in {**saved, **current} if saved.get(k, missing) != current.get(k, missing)]
    if keys:
        differences = some([f"{k}: {saved.get(k, 'unset')} then, {current.get(k, 'unset')} now" for k in keys])
        raise ValueError(
            f"the checkpoint's run had other settings ({differences}). Resume with the same, or start a run of its "
            "own from these weights with --model_name_or_path"
        )


def random_state() -> dict[str, torch.Tensor]:
    """The state of torch's generators in this process, as uint8 vectors: `cpu`, and `cuda` where there is a GPU."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, torch.Tensor]) -> None:
    """Restore what `random_state` returned; a GPU's state is ignored where there is no GPU."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def save_process_states(folder: Path, states: list[dict[str, torch.Tensor]]) -> None:
    """Write the states of all processes, in the order of ranks."""
    for rank, state in enumerate(states):
        save_file(state, folder / f"process_{rank}.safetensors")


def load_process_states(folder: Path) -> list[dict[str, torch.Tensor]]:
    """The inverse of `save_process_states`. Raises: CheckpointError."""
    num_processes = len(list(folder.glob("process_*.safetensors")))
    return [load_tensors(folder / f"process_{rank}.safetensors") for rank in range(num_processes)]
