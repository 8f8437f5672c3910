"""What a training step costs, in steps of plain SFT:  python -m eval.step_cost [--quick] [--nl-rx DIR] [--out FILE]

Every arm makes one step of the same examples with the same model in one process: forward and backward of one
micro-batch, without the optimizer. Each repetition takes a new batch and runs the arms in random order. Only ratios
within a repetition count; the report shows their median and [min, max]. Collation and masks are timed, tokenization is
not. On a CPU the time is the CPU time of the process, with the wall-clock time next to it. On a GPU it is wall-clock
time.

    sft               plain SFT: `LLMJEPATrainer` with jepa_weight 0, logits at label positions only
    sft_packed        the same with share_rows
    sft_trl           TRL's own `SFTTrainer`, as it ships (its fused head, its entropy and accuracy)
    three_rows        separate rows for LM row, context and target: the default of the published code
    three_rows_512    the same, padded to 512 tokens as in the published code
    two_rows          the LM row, and context and target in a second row under an additive mask: its --additive_mask
    ours              packed rows, one predictor token, context_view prefix
    ours_packed       the same with share_rows
    ours_k0           no predictor token
    ours_message      context_view message
    ours_forward_only target_encoder stop_gradient: targets in a pass without gradient
    ours_cached       target_encoder base: targets were embedded once, before
    ours_dropped      a step that jepa_dropout drops; dropout50 and 75 mix it with `ours` in exact proportion

The other layouts compute the same loss as `ours`: LM loss plus cosine of the same embeddings, with logits at label
positions only (the published code scores every position). So they differ in layout alone;
tests/eval/test_step_cost.py compares their losses and gradients. Their context is the prefix. Message views would cost
them the same, because the LM row is the longest. Activation checkpointing, TRL's default, is off everywhere.

On a CPU, NAME_over_matrix_products is the time of a step over that of the matrix products with weights in it.

Memory is the peak above the resting model (parameters and gradients). The allocator counts it, so it is exact on a CPU.
"""
