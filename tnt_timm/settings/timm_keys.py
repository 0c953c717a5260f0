"""timm's settings that are not ours, so that a timm user's recipe file is read as what it means, or refused."""

from typing import Dict

# timm's keys that this project does not have. A recipe that leaves them at one of these neutral values means the same
# without them; any other value is refused, because ignoring it would change the run without a word.
TIMM_KEYS_LEFT_OUT: Dict[str, tuple] = {
    "aug_splits": (0, None),
    "amp_impl": ("native", None),
    "apex_amp": (False, None),
    "bce_loss": (False, None),
    "bce_pos_weight": (None,),
    "bce_sum": (False, None),
    "bce_target_thresh": (None,),
    "bn_eps": (None,),
    "bn_momentum": (None,),
    "channels_last": (False, None),
    "color_jitter_prob": (None,),
    "dataset_trust_remote_code": (False, None),
    "device_modules": (None,),
    "drop_block": (None, 0.0),
    "drop_connect": (None, 0.0),
    "epoch_repeats": (0.0, None),
    "fast_norm": (False, None),
    "gaussian_blur_prob": (None, 0.0),
    "grayscale_prob": (None, 0.0),
    "head_init_bias": (None,),
    "head_init_scale": (None,),
    "in_chans": (None, 3),
    "input_img_mode": (None, "RGB"),
    "input_size": (None,),
    "jsd_loss": (False, None),
    "layer_decay_min_scale": (0, None),
    "layer_decay_no_opt_scale": (None,),
    "model_dtype": (None, "float32"),
    "model_ema_force_cpu": (False, None),
    "naflex_loader": (False, None),
    "native_amp": (False, None),
    "no_resume_opt": (False, None),
    "resplit": (False, None),
    "split_bn": (False, None),
    "start_epoch": (None,),
    "sync_bn": (False, None),
    "torchcompile_mode": (None,),
    "torchscript": (False, None),
    "train_crop_mode": (None, "rrc"),
    "train_img_sizes": (None,),
    "tta": (0, None),
    "val_interval": (1, None),
    "wandb_resume_id": ("", None),
}

# timm's keys about how timm does its work, not about what is computed: any value is accepted, with a notice.
TIMM_KEYS_WITHOUT_MEANING = frozenset(
    "checkpoint_hist dist_bn fuser kd_student_feature_dim kd_teacher_feature_dim local_rank naflex_loss_scale "
    "naflex_max_seq_len naflex_patch_size_probs naflex_patch_sizes naflex_patchify_channels_first naflex_train_seq_lens "
    "no_ddp_bb no_prefetcher patience_epochs pin_mem save_images synchronize_step train_batch_sizes "
    "train_batches_per_epoch train_size_probs train_size_random_mix train_size_schedule train_size_schedule_spread "
    "use_multi_epochs_loader variable_batch_loss_scale worker_seeding".split()
)
