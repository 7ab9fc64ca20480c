"""Hugging Face's Trainer and an attached adapter: its checkpoints hold what is trained, and are resumed from."""

from pathlib import Path
from typing import Any

from safetensors import torch as safetensors
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.utils import SAFE_WEIGHTS_NAME

from mitrain.core.errors import CheckpointError, ModelError
from mitrain.core.files import write_atomic
from mitrain.methods.base import Adapter
from mitrain.methods.export_format.folder import flat_group


class AdapterCallback(TrainerCallback):
    """``Trainer(model=model, callbacks=[mitrain.AdapterCallback()], …)`` of a model that an adapter is attached to.

    While it is attached, ``model.safetensors`` of every checkpoint (and of ``trainer.save_model``) holds the adapter and
    what else of the model is trained, by their names in the model, and nothing frozen; ``resume_from_checkpoint`` and
    ``load_best_model_at_end`` read it. Raises ModelError where nothing is attached, and CheckpointError where a file
    that is loaded lacks one of these tensors or has one that the model has not.
    """

    def __init__(self) -> None:
        self._model: nn.Module | None = None
        self._alone = False

    def on_init_end(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **_: Any) -> None:
        adapter = next((module for module in model.modules() if isinstance(module, Adapter)), None)
        if adapter is None:
            raise ModelError(f"no adapter is attached to this {type(model).__name__}: call mitrain.attach first")
        if args.load_best_model_at_end and hasattr(model, "get_base_model"):
            raise ModelError("the Trainer brings no best model back to PEFT's: set load_best_model_at_end=False")
        self._model, model.save_pretrained = model, self._save  # detaching takes it off, as the refusal that it replaces
        adapter._undo.callback(model.register_load_state_dict_pre_hook(self._check).remove)
        adapter._undo.callback(model.register_load_state_dict_post_hook(self._expect).remove)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._model is None:
            raise ModelError("give AdapterCallback to the Trainer itself, as Trainer(…, callbacks=[AdapterCallback()])")

    def _trained(self) -> dict[str, Tensor]:
        """By their names in the model: all tensors of adapters, and what else is trained."""
        own = {id(t) for m in self._model.modules() if isinstance(m, Adapter) for t in (*m.parameters(), *m.buffers())}
        held = self._model.state_dict(keep_vars=True)
        return {name: tensor for name, tensor in held.items() if tensor.requires_grad or id(tensor) in own}

    def _save(self, folder: str | Path, *, is_main_process: bool = True, state_dict: Any = None, **_: Any) -> None:
        """Instead of the model's ``save_pretrained``; ``state_dict`` where the Trainer has gathered it from ranks."""
        if is_main_process:
            trained = {name: (state_dict or {}).get(name, tensor) for name, tensor in self._trained().items()}
            write_atomic(Path(folder) / SAFE_WEIGHTS_NAME, safetensors.save(flat_group(trained), {"format": "pt"}))

    def _check(self, model: nn.Module, state_dict: dict[str, Tensor], *_: Any) -> None:
        trained = self._trained().keys()
        self._alone = state_dict.keys() == trained
        if wrong := sorted((trained - state_dict.keys()) | (state_dict.keys() - model.state_dict().keys())):
            raise CheckpointError(
                f"the checkpoint and what is trained here differ in {len(wrong)} tensors ({wrong[0]} …): resume with the"
                " adapter, its settings and the trained parameters that it was saved with"
            )

    def _expect(self, model: nn.Module, result: Any) -> None:
        if self._alone:  # what is frozen is not missing: the Trainer would warn of all of it
            result.missing_keys.clear()
