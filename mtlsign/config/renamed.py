"""Old names of settings, studies and perturbation kinds, with the new name of each.

An old name is an error that names the new one. It is not an alias.
"""

from __future__ import annotations

EMBED = {
    "epochs": "phase1.epochs",
    "batch": "phase1.batch",
    "lr": "phase1.lr",
    "weight_decay": "phase1.weight_decay",
    "steps": "phase2.steps",
    "wm_lr": "phase2.lr",
    "deep_lr": "phase2.other_layers_lr_scale",
    "distillation": "phase2.distillation",
    "temperature": "phase2.temperature",
    "primary_batch": "phase2.batch",
    "snapshots": "perturbation.kinds",
    "snapshots_per_step": "perturbation.per_step",
    "noise": "perturbation.noise_sigma",
    "prune": "perturbation.max_prune_ratio",
    "inner_steps": "perturbation.inner_steps",
    "inner_every": "perturbation.refresh_steps",
    "inner_lr": "perturbation.tuning_lr",
    "inner_rate": "perturbation.attack_lr",
    "init": "weights",
    "cluster_wait": "resource_timeout_s",
}
VERIFY = {"bits": "min_evidence_bits", "controls": "control_keys", "factory": "trusted_factory"}
ATTACK = {
    "budget": "extra_data_fraction",
    "copies": "other_marked_models",
    "factory": "trusted_factory",
    "bits": "min_evidence_bits",
    "cluster_wait": "resource_timeout_s",
}
SWEEP = {
    "fixed": "set",
    "bits": "min_evidence_bits",
    "max_drop": "max_accuracy_drop",
}
REPRODUCE = {"fixed": "set"}
CLAIMS = {
    "memory": "witness_state",
    "factory": "trusted_factory",
    "bits": "min_evidence_bits",
    "marked": "own_model",
    "name": "suspect_name",
    "wait": "confirmation_timeout",
    "anyway": "force",
    "already_public": "allow_public",
    "every": "interval",
    "window": "voting_window",
    "out": "output",
}
SERVICE = {
    "state": "state_dir",
    "keep_days": "retention_days",
    "former": "previous_identities",
    "token_hours": "token_ttl_hours",
    "allow": "allowed_locations",
    "factory": "trusted_factory",
    "body_s": "body_timeout_s",
    "upload_s": "upload_timeout_s",
    "upload_mb_s": "upload_rate_mb_s",
    "max_numbers": "max_activation_elements",
    "fetch_s": "fetch_timeout_s",
    "claim_s": "claim_timeout_s",
    "pointer_s": "location_cache_ttl_s",
    "queue_claims": "max_queued_claims",
    "token_claims": "max_queued_claims_per_token",
    "queue_mb": "max_queued_mb",
    "token_mb": "max_queued_mb_per_token",
    "upload_hours": "upload_ttl_hours",
    "bits": "min_evidence_bits",
    "controls": "control_keys",
    "verifiers": "min_replicas",
    "max_verifiers": "max_replicas",
    "threads": "threads_per_replica",
    "gpus": "gpus_per_replica",
    "attempts": "max_attempts",
    "announce": "publish_signing_key",
    "out": "output",
}
STUDIES = {"thresholds": "random_keys", "controls": "perturbation_ablation"}
PERTURBATION_KINDS = {"tuned": "fine_tuned", "scrubbed": "decorrelated"}
