"""Whether a run's model can be exported, and whether the disk has room for all that it will write: known before the
first step, since after the last one it would be too late."""

from __future__ import annotations

from colrow.checkpoint.carried import Carried
from colrow.checkpoint.export import require_exportable
from colrow.checkpoint.folder import CheckpointInfo, newest_complete
from colrow.checkpoint.space import RunSpace, checkpoint_bytes, export_bytes
from colrow.config import RunConfig
from colrow.errors import ConfigError, ExportError
from colrow.models.build import Source
from colrow.models.llama import Llama
from colrow.run.progress import labelled


def output_lines(config: RunConfig, source: Source, stored: list[CheckpointInfo]) -> list[str]:
    """What to print of the run's outputs: why there will be no export, and the space that is needed and free.

    Args:
        stored: the checkpoints in the run's folder.

    Raises:
        CheckpointError: the disk is too small.
    """
    warning = export_warning(config, source)
    exports = _requested(config, source) and not warning
    needed = space_of(config, source, exports, stored).require_free(config.run.dir)
    return [*_damaged(stored), *warning, labelled("disk", needed)]


def _damaged(stored: list[CheckpointInfo]) -> list[str]:
    """Checkpoints that are newer than the one that the run continues from."""
    newest = newest_complete(stored)
    return [
        labelled("warning", f"{info.path} is damaged ({info.reason}): the run continues from step {newest.step}")
        for info in stored
        if newest is not None and info.state == "damaged" and info.step > newest.step
    ]


def will_export(config: RunConfig, source: Source) -> bool:
    """Whether the run is to end with an export, and can write it."""
    return _requested(config, source) and not export_warning(config, source)


def _requested(config: RunConfig, source: Source) -> bool:
    return config.checkpoint.export and source.exported_config is not None


def export_warning(config: RunConfig, source: Source) -> list[str]:
    """Why the run cannot write the export that it is to end with; empty where it can, or is to write none."""
    model_config = source.exported_config
    if not config.checkpoint.export or model_config is None or type(source.model) is Llama:
        return []
    try:
        require_exportable(source.model, model_config, source.folder if config.model.trust_code else None)
    except (ConfigError, ExportError) as error:
        return [labelled("warning", f"there will be no export: {error}")]
    return []


def space_of(config: RunConfig, source: Source, exports: bool, stored: list[CheckpointInfo]) -> RunSpace:
    """What the run will write into its folder beside `stored`: the checkpoints that it keeps and the one being saved,
    and an export."""
    saves = int(config.checkpoint.last)
    if config.checkpoint.every:
        saves += (config.train.steps - 1) // config.checkpoint.every
    dtype = Carried(model=source.folder).dtype(config.export.dtype)
    return RunSpace(
        checkpoint=checkpoint_bytes(source.model),
        checkpoints=min(config.checkpoint.keep + 1, max(1, saves)),  # 1: a stop saves too
        present=sum(info.state == "complete" for info in stored),
        export=export_bytes(source.model, dtype) if exports else 0,
    )
