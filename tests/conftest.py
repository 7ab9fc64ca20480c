"""What every test shares: no model hub, no account, one thread (the tensors are tiny, and runs stay comparable)."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("OMP_NUM_THREADS", "1")
