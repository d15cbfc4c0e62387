#include "layout.h"

#include <algorithm>

namespace wa {
namespace {

// The dimensions that affect memory order (size > 1), outermost first.
std::vector<int> memory_order(const Tensor& shape, const int64_t* strides) {
    std::vector<int> order;
    auto sizes = shape.sizes();
    for (int d = 0; d < int(sizes.size()); ++d)
        if (sizes[d] > 1) order.push_back(d);
    std::sort(order.begin(), order.end(),
              [&](int a, int b) { return strides[a] != strides[b] ? strides[a] > strides[b] : a < b; });
    return order;
}

bool is_channels_last(MemoryFormat memory_format, int64_t rank) {
    return (memory_format == MemoryFormat::ChannelsLast && rank == 4) ||
           (memory_format == MemoryFormat::ChannelsLast3d && rank == 5);
}

}  // namespace

Strides strides_in(const std::vector<int64_t>& sizes, const std::vector<int>& order) {
    Strides strides(sizes.size());
    int64_t next = 1;
    for (auto d = order.rbegin(); d != order.rend(); ++d) {
        strides[*d] = next;
        bool overflows = __builtin_mul_overflow(next, std::max<int64_t>(sizes[*d], 1), &next);
        STD_TORCH_CHECK(!overflows, "more than 2^63 values in a tensor");
    }
    return strides;
}

std::vector<int> order_of(MemoryFormat memory_format, int64_t rank) {
    std::vector<int> order(rank);
    for (int d = 0; d < rank; ++d) order[d] = d;
    if (is_channels_last(memory_format, rank)) std::rotate(order.begin() + 1, order.begin() + 2, order.end());
    return order;
}

std::vector<int64_t> sizes_of(const Tensor& t) { return {t.sizes().begin(), t.sizes().end()}; }

Strides contiguous_strides(const Tensor& t) {
    return strides_in(sizes_of(t), order_of(MemoryFormat::Contiguous, t.dim()));
}

void check_memory(const char* name, const Tensor& t) {
    if (t.numel() == 0) return;
    auto sizes = t.sizes(), strides = t.strides();
    int64_t last = t.storage_offset(), bytes = 0, element = int64_t(t.element_size());
    for (size_t d = 0; d < sizes.size(); ++d) last += (sizes[d] - 1) * strides[d];
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &bytes));
    STD_TORCH_CHECK(last < bytes / element, name, ": a tensor's storage of ", bytes, " bytes ends before its element ",
                    last, " of ", element, " bytes");
}

bool is_dense(const Tensor& t) {
    if (t.is_contiguous()) return true;
    auto sizes = t.sizes(), strides = t.strides();
    std::vector<int> order = memory_order(t, strides.data());
    int64_t expected = 1;
    for (auto d = order.rbegin(); d != order.rend(); ++d) {
        if (strides[*d] != expected) return false;
        expected *= sizes[*d];
    }
    return t.numel() > 0;
}

bool has_contiguous_filters(const Tensor& t) {
    int64_t numel = t.numel(), filters = t.size(0);
    return numel == 0 || filters == 1 || t.stride(0) == numel / filters;
}

const int64_t* result_strides(const Tensor& t, MemoryFormat memory_format, Strides& storage) {
    bool empty = t.numel() == 0;
    bool keeps = memory_format != MemoryFormat::Contiguous && !is_channels_last(memory_format, t.dim());
    if (keeps && !empty && is_dense(t)) return strides_of(t);
    std::vector<int> order = order_of(empty ? MemoryFormat::Contiguous : memory_format, t.dim());
    storage = strides_in(sizes_of(t), order);
    return storage.data();
}

bool same_order(const Tensor& shape, const int64_t* a, const int64_t* b) {
    if (a == b) return true;
    auto sizes = shape.sizes();
    for (size_t d = 0; d < sizes.size(); ++d)
        if (sizes[d] > 1 && a[d] != b[d]) return false;
    return true;
}

int64_t transposed_columns(const Tensor& shape, const int64_t* from, const int64_t* to) {
    std::vector<int> a = memory_order(shape, from), b = memory_order(shape, to);
    for (std::vector<int>* order : {&a, &b}) {
        if (!order->empty() && order->front() == 0) order->erase(order->begin());
        if (std::find(order->begin(), order->end(), 0) != order->end()) return 0;
    }
    // Transposing a matrix rotates its dimensions: rows + columns becomes columns + rows.
    auto columns_begin = b.empty() ? a.end() : std::find(a.begin(), a.end(), b[0]);
    if (columns_begin == a.begin() || columns_begin == a.end()) return 0;
    int64_t columns = 1;
    for (auto d = columns_begin; d != a.end(); ++d) columns *= shape.size(*d);
    std::rotate(a.begin(), columns_begin, a.end());
    return a == b ? columns : 0;
}

Tensor empty_strided(const Tensor& like, int64_t rank, const int64_t* sizes, const int64_t* strides, ScalarType dtype) {
    int32_t device_type = 0;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
    auto code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
    AtenTensorHandle handle = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_empty_strided(rank, sizes, strides, code, device_type, like.get_device_index(), &handle));
    return Tensor(handle);
}

Tensor in_memory_of(const Tensor& t, int64_t rank, const int64_t* sizes, const int64_t* strides, int64_t offset) {
    AtenTensorHandle handle = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(t.get(), rank, sizes, strides, offset, &handle));
    return Tensor(handle);
}

Tensor in_order(const Tensor& t, const int64_t* strides) {
    if (same_order(t, strides_of(t), strides)) return t;
    Tensor copy = empty_strided(t, t.dim(), t.sizes().data(), strides, t.scalar_type());
    torch::stable::copy_(copy, t);
    return copy;
}

}  // namespace wa
