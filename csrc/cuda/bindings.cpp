// The Python module: addresses in, nothing out. The caller keeps every tensor alive until the stream has passed.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>
#include <vector>

#include "normalize.h"

namespace py = pybind11;

namespace bssn {
namespace cuda {
namespace {

// More tiles than this for each program: tickets are drawn ahead.
constexpr int kManyTiles = 8;

template <class P>
const P* pointer(uintptr_t address) {
  return reinterpret_cast<const P*>(address);
}

Call make_call(const std::vector<uintptr_t>& tables, const std::vector<uintptr_t>& buffers,
               const std::vector<int>& sizes, const std::vector<int>& dtypes, bool both,
               const std::vector<uintptr_t>& tensors, uintptr_t table, int device, uintptr_t stream) {
  Call call;
  LaunchParams& launch = call.launch;
  launch.tiles = pointer<Tile>(tables.at(0)), launch.blocks = pointer<Block>(tables.at(1));
  launch.layers = pointer<Layer>(tables.at(2)), launch.vectors = pointer<VectorPart>(tables.at(3));
  launch.floats = pointer<Floats>(tables.at(4)), launch.addresses = pointer<Address>(tables.at(5));
  launch.saved = reinterpret_cast<void*>(buffers.at(0)), launch.work = reinterpret_cast<void*>(buffers.at(1));
  launch.doubles = reinterpret_cast<double*>(buffers.at(2));
  launch.counters = reinterpret_cast<int*>(buffers.at(3));
  launch.grad_gains = reinterpret_cast<void*>(buffers.at(4));
  launch.n_tiles = sizes.at(0), launch.n_programs = sizes.at(1), launch.n_counters = sizes.at(2);
  launch.ahead = launch.n_tiles > kManyTiles * launch.n_programs;
  call.weight_dtype = DType(dtypes.at(0)), launch.other_dtype = DType(dtypes.at(1));
  launch.vector_dtype = DType(dtypes.at(2)), launch.gain_dtype = DType(dtypes.at(3));
  call.both = both;
  for (uintptr_t address : tensors) call.tensors.push_back(reinterpret_cast<void*>(address));
  call.table = reinterpret_cast<void**>(table);
  call.device = device;
  call.stream = reinterpret_cast<void*>(stream);
  return call;
}

template <void (*launch)(const Call&)>
void bound(const std::vector<uintptr_t>& tables, const std::vector<uintptr_t>& buffers, const std::vector<int>& sizes,
           const std::vector<int>& dtypes, bool both, const std::vector<uintptr_t>& tensors, uintptr_t table, int device,
           uintptr_t stream) {
  const Call call = make_call(tables, buffers, sizes, dtypes, both, tensors, table, device, stream);
  py::gil_scoped_release release;
  launch(call);
}

void store_vectors(uintptr_t parts, int n, uintptr_t addresses, uintptr_t saved, bool wide, int device,
                   uintptr_t stream) {
  const StoreCall call = {pointer<VectorPart>(parts), n,      pointer<Address>(addresses),
                          pointer<void>(saved),       wide,   device,
                          reinterpret_cast<void*>(stream)};
  py::gil_scoped_release release;
  store(call);
}

std::map<std::string, std::vector<std::string>> field_names() {
  std::map<std::string, std::vector<std::string>> names;
#define BSSN_NAME(name) of.push_back(#name);
  {
    auto& of = names["tile"];
    BSSN_TILE_FIELDS(BSSN_NAME)
  }
  {
    auto& of = names["block"];
    BSSN_BLOCK_FIELDS(BSSN_NAME)
  }
  {
    auto& of = names["layer"];
    BSSN_SHAPE_FIELDS(BSSN_NAME)
  }
  {
    auto& of = names["role"];
    BSSN_ROLE_FIELDS(BSSN_NAME)
  }
  {
    auto& of = names["vector"];
    BSSN_VECTOR_FIELDS(BSSN_NAME)
  }
  {
    auto& of = names["address"];
    BSSN_ADDRESSES(BSSN_NAME)
  }
  {
    auto& of = names["scalar"];
    BSSN_SCALARS(BSSN_NAME)
  }
#undef BSSN_NAME
  return names;
}

}  // namespace
}  // namespace cuda
}  // namespace bssn

PYBIND11_MODULE(_cuda, m, py::mod_gil_not_used()) {
  using namespace bssn::cuda;
  m.doc() =
      "Fused spectral normalization on an NVIDIA GPU, one launch a call. tables: tiles, blocks, layers, vectors, floats,"
      " addresses; buffers: saved, work, doubles, counters, grad_gains; sizes: tiles, programs, counters; dtypes: of the"
      " weights, of W_bar or its gradient, of the stored vectors, of the gains.";
  m.def("forward", &bound<forward>);
  m.def("backward", &bound<backward>);
  m.def("store", &store_vectors, "The new vectors of a forward, to where they are stored.");
  m.def("resident_programs", [](bool forward, int dtype, bool both, int device) {
    return resident_programs(forward, bssn::DType(dtype), both, device);
  });
  m.def("missing_code", &missing_code, "Why there is no code for a device; empty where there is.");
  m.def("fields", &field_names, "Columns of the tables.");
  m.attr("TENSORS") = kTensors;
  m.attr("COUNTER_STRIDE") = kCounterStride;
  m.attr("FLAT") = kFlat;
  m.attr("MOST_CHUNKS") = kMostChunks;
}
