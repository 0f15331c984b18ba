"""A checkpoint's own processor, for still images: Pillow and numpy do the work, torchvision need not be installed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightkv_export.errors import UserError

if TYPE_CHECKING:
    from transformers import ProcessorMixin


def load_processor(directory: Path) -> ProcessorMixin:
    """The processor of the checkpoint in `directory`, with the image processor that computes with Pillow.

    `AutoProcessor` refuses families that also take videos where torchvision is missing. Their processors are put
    together here from the same parts, with a video processor that does nothing.

    Raises:
        UserError: files are missing or wrong, or the processor needs a package that is not installed.
    """
    from transformers import AutoConfig, AutoProcessor
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    try:
        kind = PROCESSOR_MAPPING.get(type(AutoConfig.from_pretrained(directory, trust_remote_code=False)), None)
        if kind is not None and "video_processor" in kind.get_attributes():
            return _still_images(kind, directory)
        return AutoProcessor.from_pretrained(directory, trust_remote_code=False, backend="pil")
    except ImportError as error:
        raise UserError(
            f"the processor of {directory} needs a package: {str(error).strip().splitlines()[0]}",
            expected="what the checkpoint's processor imports",
            fix="install the package that the message names",
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{directory} has no usable processor: {str(error).splitlines()[0]}",
            expected="tokenizer.json, a chat template and preprocessor_config.json beside the weights",
        ) from None


def _still_images(kind: type[ProcessorMixin], directory: Path) -> ProcessorMixin:
    from transformers import AutoImageProcessor, AutoTokenizer
    from transformers.video_processing_utils import BaseVideoProcessor

    class StillImages(kind):
        """The family's processor; its base class cannot name the class of a video processor without torchvision."""

        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if argument_name == "video_processor":
                return BaseVideoProcessor
            return super().check_argument_for_proper_class(argument_name, argument)

    settings, unused = kind.get_processor_dict(directory)
    parts = {
        "image_processor": AutoImageProcessor.from_pretrained(directory, trust_remote_code=False, backend="pil"),
        "tokenizer": AutoTokenizer.from_pretrained(directory, trust_remote_code=False),
        "video_processor": BaseVideoProcessor(),
    }
    return StillImages.from_args_and_dict([parts[name] for name in kind.get_attributes()], settings, **unused)
