"""``mitrain bench parity``: does sharding or a low-bit format change what is learned, and what does each rank hold?

cells     what is measured: stages, precisions, ranks
ranks     a cell in processes of its own
worker    what each of them does
measured  training under measurement       resident  bytes by storages       peers  bitsandbytes' module, PEFT's LoRA
judge     losses beside their references, bytes beside their limit
parity    all cells, resumed where they stopped       table  Markdown
"""
