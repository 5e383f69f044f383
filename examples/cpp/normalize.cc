// Instance norm forward and backward on a picture, from C++, with all that is needed read from the
// artifact's manifest.
//
// usage: normalize ARTIFACT PICTURE.ppm
// ARTIFACT: the directory of an artifact of instance_norm over ("N", 3, "H", "W") in float32.
//
// docs/c-hosts.md has the command that compiles it and describes the calls.
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/json.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>

#include <fstream>
#include <iostream>
#include <iterator>
#include <map>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "picture.h"
#include "plain_norm.h"

namespace ffi = tvm::ffi;
namespace json = tvm::ffi::json;

// What to do with an output, two bits each in the order of the outputs.
enum Request : int64_t { kNone = 0, kWrite = 1, kAdd = 2 };

std::string text_of(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error(path + ": cannot be read");
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

json::Value field(const json::Value& object, const char* name) {
  return object.cast<json::Object>().at(ffi::String(name));
}

std::string text(const json::Value& object, const char* name) {
  return field(object, name).cast<ffi::String>();
}

// Linux's names of this CPU's features.
std::set<std::string> cpu_flags() {
  std::istringstream lines(text_of("/proc/cpuinfo"));
  for (std::string line; std::getline(lines, line);) {
    if (line.rfind("flags", 0) != 0 && line.rfind("Features", 0) != 0) continue;
    std::istringstream words(line.substr(line.find(':') + 1));
    return {std::istream_iterator<std::string>(words), {}};
  }
  return {};
}

// Linux's names of CPU features where LLVM has another one and they differ in more than dots and
// dashes.
const std::map<std::string, std::string> kLinuxNames = {
#if defined(__x86_64__)
    {"64bit", "lm"},
    {"avx512bf16", "avx512_bf16"},
    {"avx512bitalg", "avx512_bitalg"},
    {"avx512fp16", "avx512_fp16"},
    {"avx512vbmi2", "avx512_vbmi2"},
    {"avx512vnni", "avx512_vnni"},
    {"avx512vp2intersect", "avx512_vp2intersect"},
    {"avx512vpopcntdq", "avx512_vpopcntdq"},
    {"avxvnni", "avx_vnni"},
    {"bmi", "bmi1"},
    {"crc32", "sse4_2"},
    {"lzcnt", "abm"},
    {"pclmul", "pclmulqdq"},
    {"prfchw", "3dnowprefetch"},
    {"rdrnd", "rdrand"},
    {"sahf", "lahf_lm"},
    {"sha", "sha_ni"},
    {"shstk", "user_shstk"},
    {"sse3", "pni"},
    {"x87", "fpu"},
#elif defined(__aarch64__)
    {"complxnum", "fcma"},
    {"crc", "crc32"},
    {"dotprod", "asimddp"},
    {"fp-armv8", "fp"},
    {"fp16fml", "asimdfhm"},
    {"fptoint", "frint"},
    {"fullfp16", "asimdhp"},
    {"jsconv", "jscvt"},
    {"lse", "atomics"},
    {"lse2", "uscat"},
    {"neon", "asimd"},
    {"rcpc", "lrcpc"},
    {"rdm", "asimdrdm"},
#endif
};

// Whether Linux reports a feature that LLVM calls `name`.
bool has_feature(const std::set<std::string>& flags, const std::string& name) {
  std::string plain = name;
  for (char& letter : plain) {
    if (letter == '.' || letter == '-') letter = '_';
  }
  auto other = kLinuxNames.find(name);
  return flags.count(plain) || (other != kLinuxNames.end() && flags.count(other->second));
}

// Whether this CPU has what a library's target needs, which the manifest lists in LLVM's names.
bool runs_here(const json::Value& target) {
  static const std::set<std::string> flags = cpu_flags();
#if defined(__x86_64__)
  if (text(target, "triple").rfind("x86_64-", 0) != 0) return false;
#elif defined(__aarch64__)
  if (text(target, "triple").rfind("aarch64-", 0) != 0) return false;
#endif
  for (const json::Value& each : field(target, "features").cast<json::Array>()) {
    if (!has_feature(flags, each.cast<ffi::String>())) return false;
  }
  return true;
}

// The library that makes the most of this CPU.
std::string best_library(const json::Value& manifest) {
  size_t most = 0;
  std::string best;
  for (const json::Value& library : field(manifest, "libraries").cast<json::Array>()) {
    json::Value target = field(library, "target");
    size_t features = field(target, "features").cast<json::Array>().size() + 1;
    // An object file (form "object") still has to be linked.
    if (text(library, "form") == "library" && runs_here(target) && features > most) {
      most = features;
      best = text(library, "file");
    }
  }
  if (best.empty()) throw std::runtime_error("no library of the artifact runs on this CPU");
  return best;
}

// An artifact's library and what the manifest says of it.
class Artifact {
 public:
  explicit Artifact(const std::string& folder)
      : manifest_(json::Parse(text_of(folder + "/manifest.json"))),
        module_(ffi::Module::LoadFromFile(folder + "/" + best_library(manifest_))) {}

  json::Value spec() const { return field(manifest_, "spec"); }

  // Calls a kind with tensors by name, in the manifest's order. Outputs that are not among the
  // requests are not computed.
  void call(const char* kind, std::map<std::string, DLTensor*> tensors,
            const std::map<std::string, Request>& requests) const {
    json::Value entry = field(field(manifest_, "kinds"), kind);
    std::vector<ffi::AnyView> arguments;
    for (const json::Value& port : field(entry, "inputs").cast<json::Array>()) {
      arguments.emplace_back(tensors.at(text(port, "name")));
    }
    // A tensor of no elements stands for an output that is not asked for; it needs no memory.
    int64_t zeros[8] = {}, request = 0;
    std::vector<DLTensor> none(field(entry, "outputs").cast<json::Array>().size());
    int index = 0;
    for (const json::Value& port : field(entry, "outputs").cast<json::Array>()) {
      auto asked = requests.find(text(port, "name"));
      if (asked != requests.end()) {
        request |= asked->second << 2 * index;
        arguments.emplace_back(tensors.at(asked->first));
      } else {
        int rank = static_cast<int>(field(port, "shape").cast<json::Array>().size());
        DLDataType dtype = ffi::StringToDLDataType(text(port, "dtype"));
        none[index] = DLTensor{nullptr, {kDLCPU, 0}, rank, dtype, zeros, nullptr, 0};
        arguments.emplace_back(&none[index]);
      }
      ++index;
    }
    arguments.emplace_back(request);
    ffi::Any result;
    ffi::Function function = module_->GetFunction(text(entry, "function")).value();
    function.CallPacked(arguments.data(), static_cast<int32_t>(arguments.size()), &result);
  }

 private:
  json::Value manifest_;
  ffi::Module module_;
};

// A compact float32 tensor on the CPU and its memory.
struct Tensor {
  explicit Tensor(std::vector<int64_t> extents) : shape(std::move(extents)) {
    size_t count = 1;
    for (int64_t extent : shape) count *= static_cast<size_t>(extent);
    values.resize(count);
  }
  DLTensor view() {
    return {values.data(), {kDLCPU, 0}, static_cast<int32_t>(shape.size()),
            {kDLFloat, 32, 1}, shape.data(), nullptr, 0};
  }
  std::vector<int64_t> shape;
  std::vector<float> values;
};

bool run(const Artifact& artifact, const picture& photo) {
  if (text(artifact.spec(), "op") != "instance_norm") {
    throw std::runtime_error("expected an artifact of instance_norm");
  }
  double eps = field(artifact.spec(), "eps").cast<double>();
  std::vector<int64_t> image = {1, 3, photo.height, photo.width}, planes = {1, 3, 1, 1};
  std::map<std::string, Tensor> t;
  for (const char* name : {"x", "y", "dy", "dx"}) t.emplace(name, Tensor(image));
  for (const char* name : {"mean", "inv_std"}) t.emplace(name, Tensor(planes));
  for (const char* name : {"gamma", "beta", "dgamma", "dbeta"}) t.emplace(name, Tensor({3}));
  t.at("x").values.assign(photo.values, photo.values + t.at("x").values.size());
  t.at("gamma").values = {0.5f, 1.0f, 2.0f};
  t.at("beta").values = {0.1f, 0.0f, -0.3f};
  std::map<std::string, DLTensor> views;
  std::map<std::string, DLTensor*> tensors;
  for (auto& [name, tensor] : t) {
    views[name] = tensor.view();
    tensors[name] = &views[name];
  }

  artifact.call("forward", tensors, {{"y", kWrite}, {"mean", kWrite}, {"inv_std", kWrite}});
  // The gradient of sum(y^4) / 4.
  std::vector<float>&y = t.at("y").values, &dy = t.at("dy").values;
  for (size_t i = 0; i < y.size(); ++i) dy[i] = y[i] * y[i] * y[i];
  artifact.call("backward", tensors, {{"dx", kWrite}, {"dgamma", kWrite}, {"dbeta", kWrite}});
  // Once more, only to add to dgamma.
  artifact.call("backward", tensors, {{"dgamma", kAdd}});

  size_t m = static_cast<size_t>(photo.height * photo.width);
  std::map<std::string, std::vector<double>> right;
  for (auto& [name, tensor] : t) right[name].resize(tensor.values.size());
  for (size_t c = 0; c < 3; ++c) {
    const float* plane = photo.values + c * m;
    float gamma = t.at("gamma").values[c], beta = t.at("beta").values[c];
    double &mean = right["mean"][c], &inv_std = right["inv_std"][c];
    plain_forward(plane, m, gamma, beta, eps, &right["y"][c * m], &mean, &inv_std);
    plain_backward(&dy[c * m], plane, m, gamma, mean, inv_std, &right["dx"][c * m],
                   &right["dgamma"][c], &right["dbeta"][c]);
    right["dgamma"][c] *= 2;  // it was added to itself
  }
  bool close = true;
  for (const char* name : {"y", "mean", "inv_std", "dx", "dgamma", "dbeta"}) {
    const std::vector<float>& got = t.at(name).values;
    close &= is_close(name, got.data(), right[name].data(), got.size(), 1e-5) != 0;
  }
  return close;
}

int main(int argc, char** argv) {
  if (argc != 3) {
    std::cerr << "usage: " << argv[0] << " ARTIFACT PICTURE.ppm\n";
    return 2;
  }
  picture photo;
  if (!read_picture(argv[2], &photo)) {
    std::cerr << argv[2] << ": no PPM picture\n";
    return 2;
  }
  try {
    bool right = run(Artifact(argv[1]), photo);
    free(photo.values);
    return right ? 0 : 1;
  } catch (const std::exception& error) {  // ffi::Error is one
    std::cerr << error.what() << "\n";
    return 3;
  }
}
