"""Metrics that every evaluation reports, of any stage and of one with a concept head."""

REQUIRED = {
    "attack_success",
    "attack_success_unguarded",
    "over_refusal_clean",
    "over_refusal_twins",
    "over_refusal_text_twins",
    "general_accuracy",
}
REQUIRED_HEAD = {"type_accuracy", "type_macro_f1", "level_qwk", "unsafe_auroc", "text_risk_recall"}
