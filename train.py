"""Train PSA-VLM: `deepspeed train.py --stage 1`, then `deepspeed train.py --stage 2`.

Without further options the sandbox recipe runs; `--recipe llava-1.5-7b --model_name_or_path ... --data_path ...
--image_folder ... --output_dir ...` is the real thing. `--help` lists every option; psa_fast/train.py is the program.
"""

from __future__ import annotations

import sys

from psa_fast.train import main

if __name__ == "__main__":
    sys.exit(main())
