"""Every command, in the order and under the headings of ``mitrain --help``: what it does, and who adds its options.

A new command is a line here and a function ``add_NAME(sub)`` in a module of this package, which calls `shared.describe` and
adds the options. Its module is imported when the command is asked for, so that no other one pays for it.
"""

HIDDEN = ""
"""The heading of what serves the project's own evidence: it is run from a clone, is not in the wheel, and is not listed."""

COMMANDS = {
    "begin with your own data": {
        "init": ("init:add_init", "write a configuration for a table of your own"),
        "config": ("config:add_config", "show configurations and the settings they can have"),
        "data": ("catalogue:add_data", "list, prepare or inspect data sets"),
        "models": ("catalogue:add_models", "list or prepare frozen backbones with real weights"),
    },
    "train": {
        "plan": ("plan:add_plan", "whether a configuration fits on a machine, and what a step takes there"),
        "train": ("train:add_train", "train from a configuration, or resume a run"),
        "resume": ("train:add_resume", "continue a run that was stopped, from its newest checkpoint"),
        "launch": ("launch:add_launch", "submit a run to a cluster"),
        "runs": ("runs:add_runs", "list runs with their state and best score, or compare some"),
        "compare": ("compare:add_compare", "measure methods beside one another, on your data or ours"),
    },
    "ask a run": {
        "eval": ("ask:add_eval", "score a run's best checkpoint on a split"),
        "predict": ("ask:add_predict", "ask a run about one sample's files, or about every row of a table"),
        "chat": ("chat:add_chat", "ask a run one question after another, in the terminal or from a pipe"),
        "serve": ("serve:add_serve", "answer by a page in the browser and an HTTP API"),
    },
    "share": {
        "export": ("publish:add_export", "write a run's adapter to a folder that others can load"),
        "push": ("publish:add_push", "publish an export on the Hugging Face Hub"),
        "report": ("publish:add_report", "make the tables and figures of finished runs"),
    },
    "this machine": {
        "cache": ("cache:add_cache", "what lies in the cache, and what of it may go"),
        "completion": ("completion:add_completion", "print what lets a shell complete commands, options and files"),
        "doctor": ("doctor:add_doctor", "versions, CPU, GPU, and what would keep a run from starting here"),
    },
    HIDDEN: {
        "bench": (
            "bench:add_bench",
            "benchmarks: parity of shards, faults, loading, steps, encoding, kernels, and the papers' claims",
        ),
    },
}

EXAMPLES = """examples:
  mitrain init --data photos.csv             a configuration for your table, and the next command
  mitrain train quickstart                   train a shipped example
  mitrain runs                               the runs so far, with the commands that ask them
  mitrain COMMAND --help                     options and examples of one
"""


def overview() -> str:
    """The commands under their headings, a line each, and examples."""
    parts = []
    for heading, commands in ((heading, group) for heading, group in COMMANDS.items() if heading != HIDDEN):
        parts.append(f"{heading}:\n" + "".join(f"  {name:11s}{text}\n" for name, (_, text) in commands.items()))
    return "\n".join([*parts, EXAMPLES])
