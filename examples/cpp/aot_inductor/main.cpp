// Runs what compile_model.py has written, without Python: the package calls the fused op, which
// libcoreai_torch_ops has registered with PyTorch's dispatcher when it was loaded.
//
//   aot_inductor FOLDER
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>
#include <torch/types.h>

#include <fstream>
#include <iostream>
#include <iterator>
#include <string>
#include <vector>

namespace {

torch::Tensor read_tensor(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  return torch::jit::pickle_load(bytes).toTensor();
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::cerr << "usage: " << argv[0] << " FOLDER, where compile_model.py has written\n";
    return 2;
  }
  const std::string folder = std::string(argv[1]) + "/";
  torch::inductor::AOTIModelPackageLoader model(folder + "model.pt2");
  std::vector<torch::Tensor> inputs = {read_tensor(folder + "input.pt")};
  const torch::Tensor output = model.run(inputs).at(0);
  const bool equal = torch::equal(output, read_tensor(folder + "output.pt"));
  std::cout << "output " << output.sizes() << (equal ? " is" : " is NOT")
            << " Python's, to the bit\n";
  return equal ? 0 : 1;
}
