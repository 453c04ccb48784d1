"""Variables of the environment that might change a run or stop it, as people and launchers set them."""

from __future__ import annotations

LAUNCHED = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "nowhere.invalid", "MASTER_PORT": "1"}
ENVIRONMENTS: tuple[dict[str, str], ...] = (
    {**LAUNCHED, "TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_USE_AGENT_STORE": "True"},
    {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "1"},
    {"PMI_SIZE": "4", "PMI_RANK": "1", "MPI_LOCALRANKID": "1"},
    {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "1"},
    {"ACCELERATE_USE_DEEPSPEED": "true"},
    {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_USE_CPU": "x"},
    {"ACCELERATE_DYNAMO_BACKEND": "inductor", "ACCELERATE_DYNAMO_MODE": "max-autotune"},
    {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
    {"NVIDIA_TF32_OVERRIDE": "1", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"},
    {"ONEDNN_DEFAULT_FPMATH_MODE": "ANY", "DNNL_DEFAULT_FPMATH_MODE": "BF16"},
    {"TORCH_LOGS": "nonsense"},
    {"TORCH_DISTRIBUTED_DEBUG": "nonsense", "TORCH_CPP_LOG_LEVEL": "nonsense"},
    {"TORCH_CUDA_SANITIZER": "1", "PYTORCH_ALLOC_CONF": "nonsense"},
    {"TORCHDYNAMO_DISABLE": "1", "TORCH_COMPILE_DISABLE": "1", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"},
    {"TRANSFORMERS_VERBOSITY": "nonsense", "DATASETS_VERBOSITY": "nonsense", "HF_HUB_VERBOSITY": "nonsense"},
    {"HF_HUB_ETAG_TIMEOUT": "x"},
    {"HF_HUB_DOWNLOAD_TIMEOUT": "x"},
    {"HF_DATASETS_IN_MEMORY_MAX_SIZE": "x"},
    {"HF_DATASETS_DISABLE_PROGRESS_BARS": "0", "HF_HUB_DISABLE_PROGRESS_BARS": "0"},
    {"HF_HOME": "/dev/null/x", "PEFTBENCH_CACHE": "/dev/null", "XDG_CACHE_HOME": "/nope"},
    {"HYDRA_FULL_ERROR": "1", "HYDRA_DEPRECATION_WARNINGS_AS_ERRORS": "1", "OC_CAUSE": "1"},
    {"PYTHONWARNINGS": "error"},
    {"PYTHONOPTIMIZE": "2"},
    {"PYTHONDEVMODE": "1"},
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    {"PYTHONIOENCODING": "ascii:strict", "TERM": "dumb", "COLUMNS": "0", "LINES": "x"},
    {"TZ": "nonsense", "HOME": "/nope", "PATH": "/nope"},
    {"TQDM_POSITION": "x", "TOKENIZERS_PARALLELISM": "true", "RAYON_NUM_THREADS": "x"},
    {"CUDA_VISIBLE_DEVICES": "x", "MKL_NUM_THREADS": "x", "MPLBACKEND": "nonsense"},
)
