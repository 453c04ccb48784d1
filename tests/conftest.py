"""One thread for each test process: the models are tiny, and several processes' threads would fight over the cores."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
