#include "layout.h"

#include <algorithm>

namespace wa {
namespace {

// The dimensions that matter for the order in memory (size > 1), outermost first.
std::vector<int> memory_order(const Tensor& shape, const Strides& strides) {
    std::vector<int> order;
    auto sizes = shape.sizes();
    for (int d = 0; d < int(sizes.size()); ++d)
        if (sizes[d] > 1) order.push_back(d);
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return strides[a] > strides[b]; });
    return order;
}

}  // namespace

Strides strides_of(const Tensor& t) {
    auto s = t.strides();
    return Strides(s.begin(), s.end());
}

Strides contiguous_strides(const Tensor& t) {
    auto sizes = t.sizes();
    Strides strides(sizes.size());
    int64_t next = 1;
    for (int d = int(sizes.size()) - 1; d >= 0; --d) {
        strides[d] = next;
        next *= std::max<int64_t>(sizes[d], 1);
    }
    return strides;
}

bool is_dense(const Tensor& t) {
    if (t.is_contiguous()) return true;
    auto sizes = t.sizes(), strides = t.strides();
    std::vector<int> order = memory_order(t, strides_of(t));
    int64_t expected = 1;
    for (auto d = order.rbegin(); d != order.rend(); ++d) {
        if (strides[*d] != expected) return false;
        expected *= sizes[*d];
    }
    return t.numel() > 0;
}

bool has_contiguous_filters(const Tensor& t) {
    return t.numel() == 0 || t.size(0) == 1 || t.stride(0) == t.numel() / t.size(0);
}

Strides result_strides(const Tensor& t, MemoryFormat memory_format) {
    bool channels_last = (memory_format == MemoryFormat::ChannelsLast && t.dim() == 4) ||
                         (memory_format == MemoryFormat::ChannelsLast3d && t.dim() == 5);
    if (channels_last) {
        auto sizes = t.sizes();
        int rank = int(sizes.size());
        Strides strides(rank);
        int64_t next = std::max<int64_t>(sizes[1], 1);
        strides[1] = 1;
        for (int d = rank - 1; d > 1; --d) strides[d] = next, next *= std::max<int64_t>(sizes[d], 1);
        strides[0] = next;
        return strides;
    }
    bool own = memory_format != MemoryFormat::Contiguous && is_dense(t);
    return own ? strides_of(t) : contiguous_strides(t);
}

bool same_order(const Tensor& shape, const Strides& a, const Strides& b) {
    auto sizes = shape.sizes();
    for (size_t d = 0; d < sizes.size(); ++d)
        if (sizes[d] > 1 && a[d] != b[d]) return false;
    return true;
}

int64_t transposed_columns(const Tensor& shape, const Strides& from, const Strides& to) {
    std::vector<int> a = memory_order(shape, from), b = memory_order(shape, to);
    for (std::vector<int>* order : {&a, &b}) {
        if (!order->empty() && order->front() == 0) order->erase(order->begin());
        if (std::find(order->begin(), order->end(), 0) != order->end()) return 0;
    }
    // A transposed matrix is the same cycle of dimensions, begun elsewhere: rows + columns became columns + rows.
    auto columns_begin = b.empty() ? a.end() : std::find(a.begin(), a.end(), b[0]);
    if (columns_begin == a.begin() || columns_begin == a.end()) return 0;
    int64_t columns = 1;
    for (auto d = columns_begin; d != a.end(); ++d) columns *= shape.size(*d);
    std::rotate(a.begin(), columns_begin, a.end());
    return a == b ? columns : 0;
}

Tensor empty_strided(const Tensor& like, const Strides& strides, ScalarType dtype) {
    int32_t device_type = 0;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
    auto code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
    auto sizes = like.sizes();
    AtenTensorHandle handle = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(), code,
                                                           device_type, like.get_device_index(), &handle));
    return Tensor(handle);
}

Tensor in_order(const Tensor& t, const Strides& strides) {
    if (same_order(t, strides_of(t), strides)) return t;
    Tensor copy = empty_strided(t, strides, t.scalar_type());
    torch::stable::copy_(copy, t);
    return copy;
}

}  // namespace wa
