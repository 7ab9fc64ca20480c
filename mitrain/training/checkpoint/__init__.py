"""Checkpoints: only what is trained, in safetensors and JSON, published whole or not at all.

    RUN/checkpoints/step-00000100/
        adapter.safetensors    one file per group of named tensors (adapter, head, optimizer, …)
        state.json             counters, random states, data cursor: any JSON object
        manifest.json          format version, step, and the SHA-256 and size of every other file; written last

Tensors are keyed by name and free of rank and process: nothing says how many processes wrote them. A checkpoint is
written to a hidden folder beside its final name, read back against its checksums, flushed and then renamed, so an
interruption at any moment leaves the old ones untouched. The newest *complete* one wins. Nothing is ever unpickled.
docs/guide/checkpoints.md has the format.
"""

from mitrain.training.checkpoint.folder import any_published, best, latest, save, usable
from mitrain.training.checkpoint.manifest import FORMAT, MANIFEST_LIMIT, Checkpoint, load, verify
from mitrain.training.checkpoint.modules import check_fit, not_finite, only_trainable, restore
from mitrain.training.checkpoint.rng import resume_rng, rng_of_ranks, rng_state, seed_rank, set_rng_state
