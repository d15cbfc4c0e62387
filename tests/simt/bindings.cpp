// Test-only. The Python modules simt_check and simt_asan. Memory is passed by address, dtypes by torch's names.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "../../csrc/common/activations.h"
#include "kernels.h"
#include "simt_control.h"

namespace py = pybind11;

namespace {

using Buffer = std::tuple<std::string, uintptr_t, size_t, size_t, bool>;  // name, address, bytes, granule, is an input

struct Run {
    std::vector<Buffer> buffers;
    unsigned seed, preempt_every;
    std::optional<std::pair<long long, long long>> blocks;
};

struct Fault : std::runtime_error {
    using runtime_error::runtime_error;
};

void* pointer(uintptr_t address) { return reinterpret_cast<void*>(address); }

py::dict counts_of(int buffer) {
    static const char* const kTotals[] = {"reads", "writes"};
    static const char* const kOfOne[] = {"reads_of_one", "writes_of_one"};
    simt::Counts counts = simt::counts(buffer);
    py::dict result;
    for (int is_write : {0, 1}) {
        py::dict by_width;
        for (int log2 = 0; log2 < 6; ++log2)
            if (size_t count = counts.accesses[is_write][log2])
                by_width[log2 == 5 ? py::object(py::str("copy")) : py::object(py::int_(1 << log2))] = count;
        result[kTotals[is_write]] = by_width;
        result[kOfOne[is_write]] = py::make_tuple(counts.least[is_write], counts.most[is_write]);
    }
    return result;
}

// Calls the launcher under the emulator and returns the access counts of each buffer: none if the build does not count,
// or if only some blocks ran, because such runs use more memory than can be scanned.
template <class Launcher>
py::list run(const Run& how, const Launcher& launcher) {
    simt::reset(how.seed, how.preempt_every);
    if (how.blocks) simt::only_blocks(how.blocks->first, how.blocks->second);
    for (const auto& [name, address, bytes, granule, is_input] : how.buffers)
        simt::add_buffer(name.c_str(), pointer(address), bytes, granule, is_input, !is_input);
    launcher();
    if (const char* error = simt::error()) throw Fault(error);
    py::list counts;
    if (simt::instrumented() && !how.blocks)
        for (size_t i = 0; i < how.buffers.size(); ++i) counts.append(counts_of(int(i)));
    return counts;
}

std::vector<std::tuple<unsigned, size_t, size_t, size_t>> traffic() {
    std::vector<std::tuple<unsigned, size_t, size_t, size_t>> blocks;
    for (const simt::Traffic& block : simt::traffic())
        blocks.emplace_back(block.threads, block.read, block.written, block.shared);
    return blocks;
}

wa::DType dtype_of(const std::string& name) {
    static const char* const kNames[] = {"float32", "float16", "bfloat16", "float64"};  // in DType's order
    for (int i = 0; i < 4; ++i)
        if (name == kNames[i]) return wa::DType(i);
    throw std::invalid_argument("no such dtype: " + name);
}

wa::AlignTask task_of(const py::dict& fields) {
    auto address = [&](const char* name) { return pointer(fields[name].cast<uintptr_t>()); };
    auto count = [&](const char* name) { return fields[name].cast<uint32_t>(); };
    auto dtype = [&](const char* name) { return dtype_of(fields[name].cast<std::string>()); };
    wa::AlignTask task{};
    task.weight = address("weight");
    task.grad = address("grad");
    task.out = address("out");
    task.gain = address("gain");
    task.eps = fields["eps"].cast<double>();
    task.scale = fields["scale"].cast<double>();
    task.n = count("n");
    task.filters = count("filters");
    task.first_filter = count("first_filter");
    task.transposed_columns = count("columns");
    task.weight_dtype = dtype("weight_dtype");
    task.aligned_dtype = dtype("aligned_dtype");
    task.gain_dtype = dtype("gain_dtype");
    return task;
}

wa::ImageSide side_of(const py::dict& fields) {
    auto strides = fields["strides"].cast<std::vector<int64_t>>();  // batch, channel, three spatial ones
    return {strides.at(0),
            strides.at(1),
            {strides.at(2), strides.at(3), strides.at(4)},
            dtype_of(fields["dtype"].cast<std::string>())};
}

wa::PrepareTask input_of(const py::dict& fields) {
    auto address = [&](const char* name) { return pointer(fields[name].cast<uintptr_t>()); };
    wa::PrepareTask task{};
    task.from = address("from");
    task.to = address("to");
    task.saved = address("saved");
    task.from_side = side_of(fields["from_side"].cast<py::dict>());
    task.to_side = side_of(fields["to_side"].cast<py::dict>());
    task.batch = fields["batch"].cast<uint32_t>();
    task.channels = fields["channels"].cast<uint32_t>();
    auto each = [&](const char* name, uint32_t (&numbers)[wa::kSpatial]) {
        auto list = fields[name].cast<std::vector<uint32_t>>();
        for (int d = 0; d < wa::kSpatial; ++d) numbers[d] = list.at(size_t(d));
    };
    each("size", task.size);
    each("before", task.before);
    each("after", task.after);
    each("to_size", task.to_size);
    task.mode = wa::PaddingMode(fields["mode"].cast<int>());
    task.activation = fields["activation"].cast<uint8_t>();
    task.saved_is_result = wa::Activations::is_from_result(task.activation);
    return task;
}

py::list align(const std::string& direction, const std::vector<py::dict>& fields, const std::optional<py::dict>& input,
               uintptr_t statistics, uintptr_t grad_gain, bool is_double, const Run& how) {
    std::vector<wa::AlignTask> tasks;
    for (const py::dict& f : fields) tasks.push_back(task_of(f));
    wa::AlignList list{};
    list.tasks = tasks.data();
    list.count = uint32_t(tasks.size());
    list.statistics = pointer(statistics);
    list.grad_gain = pointer(grad_gain);
    list.is_double = is_double;
    wa::PrepareTask prepared;
    if (input) prepared = input_of(*input), list.input = &prepared;
    if (direction != "forward" && direction != "backward") throw std::invalid_argument("direction: " + direction);
    return run(how, [&] { direction == "forward" ? wa::align_forward(list) : wa::align_backward(list); });
}

py::list run_selftest(const std::string& name, uintptr_t in, uintptr_t out, const Run& how) {
    return run(how, [&] {
        if (!selftest(name.c_str(), pointer(in), pointer(out))) throw std::invalid_argument("no such kernel: " + name);
    });
}

py::list run_transpose(uintptr_t in, uintptr_t out, int rows, int columns, const Run& how) {
    return run(how, [&] { selftest_transpose(pointer(in), pointer(out), rows, columns); });
}

void define(py::module_& m) {
    using namespace py::literals;
    py::register_local_exception<Fault>(m, "Fault");
    py::class_<Run>(m, "Run", py::module_local())
        .def(py::init([](std::vector<Buffer> buffers, unsigned seed, unsigned preempt_every,
                         std::optional<std::pair<long long, long long>> blocks) {
                 return Run{std::move(buffers), seed, preempt_every, blocks};
             }),
             "buffers"_a, "seed"_a = 1, "preempt_every"_a = 0, "blocks"_a = py::none());
    m.def("instrumented", simt::instrumented);
    m.def("traffic", traffic);
    m.def("align", align, "direction"_a, "tasks"_a, "input"_a, "statistics"_a, "grad_gain"_a, "is_double"_a, "run"_a);
    m.def("selftest", run_selftest, "name"_a, "x"_a, "y"_a, "run"_a);
    m.def("transpose", run_transpose, "x"_a, "y"_a, "rows"_a, "columns"_a, "run"_a);
}

}  // namespace

// Both in one object file, which is linked into both modules.
PYBIND11_MODULE(simt_check, m) { define(m); }
PYBIND11_MODULE(simt_asan, m) { define(m); }
