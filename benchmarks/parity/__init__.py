"""``mitrain bench parity``: losses and bytes of every ZeRO stage and precision beside the unsharded run.

`cells` says which runs are made, `run` makes them, `worker` is what each rank does: `steps` with our trainer, `peers` with
what others offer. `judge` says what makes a cell red, `table` shows it.
"""
