"""A distillation config as a user of torchtune has it, with comments, keys that kdtune lacks, and one that none has."""

KD = """\
# Distils a large model into a small one.
#   tune download owner/Small --output-dir /m/small --hf-token <HF_TOKEN>
#
# To run it:
#   tune run --nnodes 1 --nproc_per_node 2 knowledge_distillation_distributed --config mine/kd kd_ratio=0.7
#
# The teacher before:
#   tune run lora_finetune_single_device --config gone/7B_lora
#
# It works best on two devices.

output_dir: /runs/kd # change it

# The student
model:
  _component_: torchtune.models.qwen2.lora_qwen2_0_5b
  lora_attn_modules: ['q_proj', 'v_proj']
  apply_lora_to_mlp: True
  lora_rank: 32  # higher is more accurate
  lora_alpha: 64
teacher_model:
  _component_: torchtune.models.qwen2_5.lora_qwen2_5_1_5b_instruct
  lora_attn_modules: ['q_proj']
tokenizer:
  _component_: torchtune.models.qwen2.qwen2_tokenizer
  path: /m/small/vocab.json
  merges_file: /m/small/merges.txt
  max_seq_len: 512
checkpointer:
  _component_: torchtune.training.FullModelHFCheckpointer
  checkpoint_dir: /m/small
  checkpoint_files: [model.safetensors]
  recipe_checkpoint: null
  output_dir: ${output_dir}
  model_type: QWEN2
teacher_checkpointer:
  _component_: torchtune.training.FullModelHFCheckpointer
  checkpoint_dir: /m/large
  checkpoint_files:
    filename_format: model-{}-of-{}.safetensors
    max_filename: "00050"
  output_dir: ${output_dir}
  model_type: QWEN2
resume_from_checkpoint: False
save_adapter_weights_only: True
# The data
dataset:
  _component_: torchtune.datasets.alpaca_cleaned_dataset
  packed: False  # True is faster
seed: null
batch_size: 8
optimizer:
  _component_: torch.optim.AdamW
  lr: 3e-4
lr_scheduler:
  _component_: torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup
  num_warmup_steps: 100
loss:
  _component_: torchtune.modules.loss.CEWithChunkedOutputLoss
kd_loss:
  _component_: torchtune.modules.loss.SymmetricKLWithChunkedOutputLoss
  sym_kd_ratio: 0.25  # of the forward direction
  num_output_chunks: 16
kd_ratio: 0.7
epochs: 1
max_steps_per_epoch: null
gradient_accumulation_steps: 4
clip_grad_norm: 1.0
metric_logger:
  _component_: torchtune.training.metric_logging.DiskLogger
  log_dir: ${output_dir}/logs
log_every_n_steps: null
device: cpu
dtype: bf16
enable_activation_offloading: True
profiler:
  _component_: torchtune.training.setup_torch_profiler
  enabled: False
mystery: 3
"""
