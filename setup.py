"""What pyproject.toml cannot say: folders of the repository that have another name in the wheel.

`eval/` becomes `llm_jepa_eval`, because a package of the name eval would be in everybody's way, and `recipes/` becomes
data inside `llm_jepa`.
"""

from setuptools import find_packages, setup

EVAL = ["llm_jepa_eval" + name.removeprefix("eval") for name in find_packages(include=["eval", "eval.*"])]

setup(
    packages=[*find_packages(include=["llm_jepa", "llm_jepa.*"]), "llm_jepa.recipes", *EVAL],
    package_dir={"llm_jepa.recipes": "recipes", "llm_jepa_eval": "eval"},
    package_data={
        "llm_jepa": [
            "py.typed",
            "inherited_keys.json",
            "accelerate_configs/*.yaml",
            "checkpoints/**/*",
            "*/*.md.jinja",
            "vl/watch_page/*.jinja",
            "vl/watch_page/*.css",
            "vl/watch_page/*.js",
        ],
        "llm_jepa.recipes": ["**/*.yaml"],
        "llm_jepa_eval": ["**/*.md.jinja", "lm_eval/*", "metrics/*/*.py", "plans/*.yaml"],
    },
)
