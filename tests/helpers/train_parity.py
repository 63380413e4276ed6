"""``tools/train_rl.py`` with one more reward rule, as a user's own entry script would add it (``OISD_ENTRY``)."""

from __future__ import annotations

import sys

from tests.helpers.training import add_parity_reward, load_script

if __name__ == "__main__":
    add_parity_reward()
    sys.exit(load_script("tools/train_rl.py").main(None))
