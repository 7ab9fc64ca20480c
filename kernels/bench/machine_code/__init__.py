"""What the compiler makes of the Triton kernels, read without a GPU: ``python kernels/bench machine-code``.

aot              the command
compilation      one kernel compiled for a GPU that is not there
attention_cases  every entry of infused_attention's tables of tiles; swiglu_cases: of infused_swiglu's
audit, sass      what the machine code may not do, and how it is read
audit_runs       many cases in several processes, rows kept in the user's cache
mma, pipes       multiply-adds done and needed; the rate that a loop's instructions allow
tiles            the search for tiles (--search); expectation: beside FlashAttention (--expect)
roofline         bytes and FLOPs beside the GPUs' limits
"""
