"""Stages as scripts: each file is a flow to copy and edit; `disranker STAGE` and `accelerate launch` run them."""
