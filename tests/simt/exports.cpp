// What tests/simt_device.py calls.
#include "coreai_torch/add_rms_norm_cuda.h"
#include "platform/device.cuh"

using namespace coreai_torch;

extern "C" {

int simt_rms_norm_forward(const RmsNormForward* args) {
  return rms_norm_forward_cuda(*args, 0, nullptr);
}
int64_t simt_rms_norm_backward_workspace(const RmsNormBackward* args) {
  return rms_norm_backward_workspace_cuda(*args, 0);
}
int simt_rms_norm_backward(const RmsNormBackward* args) {
  return rms_norm_backward_cuda(*args, 0, nullptr);
}

int simt_add_rms_norm_forward(const AddRmsNormForward* args) {
  return add_rms_norm_forward_cuda(*args, 0, nullptr);
}
int64_t simt_add_rms_norm_backward_workspace(const AddRmsNormBackward* args) {
  return add_rms_norm_backward_workspace_cuda(*args, 0);
}
int simt_add_rms_norm_backward(const AddRmsNormBackward* args) {
  return add_rms_norm_backward_cuda(*args, 0, nullptr);
}

void simt_set_card(int multiprocessors, int clusters, int shared_memory_of_block) {
  card = {multiprocessors, clusters != 0, shared_memory_of_block};
}
const char* simt_last_error() { return last_error ? last_error : ""; }
int simt_launches() { return launches; }

}  // extern "C"
