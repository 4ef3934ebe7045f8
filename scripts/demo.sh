#!/usr/bin/env bash
# The whole thing in one command: sets everything up (once, in .venv), writes a story with the
# weights that ship, trains on the built-in tales for eight minutes, writes a story from a prompt,
# and an MP4 and a GIF in which it appears out of masks.
requirements=requirements.txt
source "$(dirname "$0")/setup.sh"
"$python" inference.py --checkpoint artifacts/pretrained/tales --prompt "Once upon a time"
echo
echo "That was a model that comes with nanoDLM; now your own:"
"$python" train.py tales --name demo --max_minutes 8
"$python" inference.py --prompt "Once upon a time" \
    --viz-video artifacts/media/trace.mp4 --viz-gif artifacts/media/trace.gif
echo
echo "Three stories without a prompt:"
"$python" inference.py --num-samples 3
