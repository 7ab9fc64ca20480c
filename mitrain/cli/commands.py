"""Every command, in the order and under the headings of ``mitrain --help``: what it does, and who adds its options.

A new command is a line here and a function ``add_NAME(sub)`` in a module of this package, which calls `shared.describe` and
adds the options. Its module is imported when the command is asked for, so that no other one pays for it.
"""

COMMANDS = {
    "begin with your own data": {
        "init": ("init:add_init", "write a configuration for a table or folder of your own"),
        "config": ("config:add_config", "show configurations and the settings they can have"),
        "data": ("catalogue:add_data", "list data sets, download and prepare them, or inspect your own"),
        "models": ("catalogue:add_models", "list pretrained models, or download and prepare them"),
    },
    "train": {
        "plan": ("plan:add_plan", "estimate whether a configuration fits on a machine, and how long a training step takes"),
        "train": ("train:add_train", "train from a configuration, or resume a run"),
        "resume": ("train:add_resume", "continue a run that was stopped, from its newest checkpoint"),
        "launch": ("launch:add_launch", "submit a run to a cluster"),
        "runs": ("runs:add_runs", "list runs with their state and best score, or compare some"),
        "compare": ("compare:add_compare", "train and score several methods on the same data, in one table"),
    },
    "use what was trained": {
        "eval": ("ask:add_eval", "score a run's best checkpoint on a split"),
        "predict": ("ask:add_predict", "answer about one sample's files, or about every row of a table"),
        "chat": ("chat:add_chat", "ask one question after another, in the terminal or from a pipe"),
        "serve": ("serve:add_serve", "serve a run as a page in the browser and an HTTP API"),
    },
    "share": {
        "export": ("publish:add_export", "write a run's adapter to a small folder that others can load"),
        "push": ("publish:add_push", "publish an export on the Hugging Face Hub"),
        "report": ("publish:add_report", "make the tables and figures of finished runs"),
    },
    "this machine": {
        "cache": ("cache:add_cache", "show how much is in the cache, or remove what is not needed"),
        "completion": ("completion:add_completion", "print a script that completes commands, options and files in a shell"),
        "doctor": ("doctor:add_doctor", "check versions, CPU, GPU and whatever would keep a run from starting here"),
    },
}

EXAMPLES = """examples:
  mitrain init --data photos.csv             a configuration for your table, and the next command
  mitrain train quickstart                   train a shipped example
  mitrain runs                               the runs so far, and how to use them
  mitrain COMMAND --help                     options and examples of one command
"""


def overview() -> str:
    """The commands under their headings, a line each, and examples."""
    parts = []
    for heading, commands in COMMANDS.items():
        parts.append(f"{heading}:\n" + "".join(f"  {name:11s}{text}\n" for name, (_, text) in commands.items()))
    return "\n".join([*parts, EXAMPLES])
