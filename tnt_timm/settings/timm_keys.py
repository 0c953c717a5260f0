"""timm's settings that this project does not have: what a timm recipe may say about them."""

from typing import Dict

# A recipe that leaves these at a neutral value means the same without them. Any other value is refused, because ignoring it
# would silently change the run. (0 is equal to False and to 0.0.)
TIMM_KEYS_LEFT_OUT: Dict[str, tuple] = {
    **dict.fromkeys(
        """bce_pos_weight bce_target_thresh bn_eps bn_momentum color_jitter_prob device_modules head_init_bias
        head_init_scale input_size layer_decay_no_opt_scale start_epoch torchcompile_mode train_img_sizes""".split(),
        (None,),
    ),
    **dict.fromkeys(
        """apex_amp aug_splits bce_loss bce_sum channels_last dataset_trust_remote_code drop_block drop_connect epoch_repeats
        fast_norm gaussian_blur_prob grayscale_prob jsd_loss layer_decay_min_scale model_ema_force_cpu naflex_loader native_amp
        no_resume_opt resplit split_bn sync_bn torchscript tta""".split(),
        (0, None),
    ),
    "amp_impl": ("native", None),
    "in_chans": (3, None),
    "input_img_mode": ("RGB", None),
    "model_dtype": ("float32", None),
    "train_crop_mode": ("rrc", None),
    "val_interval": (1, None),
    "wandb_resume_id": ("", None),
}

# These change how timm works, not what it computes. Any value is accepted, with a notice.
TIMM_KEYS_WITHOUT_MEANING = frozenset(
    """checkpoint_hist dist_bn fuser kd_student_feature_dim kd_teacher_feature_dim local_rank naflex_loss_scale
    naflex_max_seq_len naflex_patch_size_probs naflex_patch_sizes naflex_patchify_channels_first naflex_train_seq_lens
    no_ddp_bb no_prefetcher patience_epochs pin_mem save_images synchronize_step train_batch_sizes
    train_batches_per_epoch train_size_probs train_size_random_mix train_size_schedule train_size_schedule_spread
    use_multi_epochs_loader variable_batch_loss_scale worker_seeding""".split()
)
