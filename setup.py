from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = (ROOT / "retmask_jax/__init__.py").read_text().split('__version__ = "')[1].split('"')[0]

setup(
    name="retmask_jax",
    version=VERSION,
    description="Retrieval heads in JAX: find them, mask them, train against the masked model",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    author="The retmask_jax authors",
    keywords="jax flax attention retrieval-heads interpretability long-context dpo rope tpu",
    python_requires=">=3.11",
    packages=[*find_packages(include=["retmask_jax", "retmask_jax.*"]), "retmask_jax.configs"],
    package_dir={"retmask_jax.configs": "configs"},
    package_data={"retmask_jax": ["assets/*/*", "benchmarks/*.json", "aot/*.json", "py.typed"]},
    entry_points={"console_scripts": ["retmask = retmask_jax.cli.main:main"]},
    install_requires=[
        "jax>=0.8",
        "flax>=0.12",
        "optax>=0.2.6",
        "orbax-checkpoint>=0.11.28",
        "grain>=0.2.12",
        "ml-collections>=1.0",
        "transformers>=4.56",
        "huggingface_hub>=0.34",
        "jinja2>=3.1",
        "safetensors>=0.5",
        "tensorflow-datasets>=4.9.8",
        "importlib_resources>=6",
        "numpy>=2.0",
        "scipy>=1.13",
        "matplotlib>=3.9",
        "rouge-score>=0.1.2",
        "psutil>=5.9",
        "rich>=13",
        "tqdm>=4.66",
        "tensorboardX>=2.6",
        "qwix>=0.1",
        "jaxtyping>=0.3",
    ],
    extras_require={
        "tpu": ["jax[tpu]"],
        "gpu": ["jax[cuda13]"],
        "eval": ["lm-eval>=0.4.9", "pytrec-eval-terrier>=0.5"],
        "bench": ["torch>=2.6", "trl>=0.29"],
        "test": [
            "pytest>=8", "pytest-xdist>=3.5", "hypothesis>=6.100", "ruff>=0.6", "nbclient>=0.10", "nbformat>=5.10",
            "ipykernel>=6.29", "beartype>=0.20", "pytrec-eval-terrier>=0.5",
        ],
    },
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "License :: OSI Approved :: Apache Software License",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
