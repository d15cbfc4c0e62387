// Graphs: lists of the works that a capture saw instead of running them.
#include <algorithm>

#include "machine.h"

using namespace simcuda;

namespace simcuda {
bool is_capture_forbidden() {
    bool found = false;
    for (CUgraph_st* graph : machine().captures) {
        bool own = graph->thread == std::this_thread::get_id() && graph->mode != cudaStreamCaptureModeRelaxed;
        bool all = graph->mode == cudaStreamCaptureModeGlobal && capture_mode == cudaStreamCaptureModeGlobal;
        if (capture_mode != cudaStreamCaptureModeRelaxed && (own || all)) found = graph->is_broken = true;
    }
    return found;
}
}  // namespace simcuda

extern "C" {

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
    return call([&] {
        static unsigned long long ids = 0;
        if (!stream || stream->capture) return cudaErrorStreamCaptureUnsupported;
        stream->capture = new CUgraph_st{++ids, mode, std::this_thread::get_id()};
        machine().captures.push_back(stream->capture);
        return cudaSuccess;
    });
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
    return call([&] {
        *graph = stream->capture;
        if (!*graph) return cudaErrorInvalidValue;
        for (CUstream_st* each : machine().streams)
            if (each->capture == *graph) each->capture = nullptr;
        auto& captures = machine().captures;
        captures.erase(std::remove(captures.begin(), captures.end(), *graph), captures.end());
        if (!(*graph)->is_broken) return cudaSuccess;
        cudaGraphDestroy(std::exchange(*graph, nullptr));
        return cudaErrorStreamCaptureInvalidated;
    });
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status, unsigned long long* id,
                                     cudaGraph_t* graph, const cudaGraphNode_t**, const cudaGraphEdgeData**,
                                     size_t* dependencies) {
    return call([&] {
        CUgraph_st* capture = stream_of(stream)->capture;
        *status = !capture             ? cudaStreamCaptureStatusNone
                  : capture->is_broken ? cudaStreamCaptureStatusInvalidated
                                       : cudaStreamCaptureStatusActive;
        if (id && capture) *id = capture->id;
        if (graph) *graph = capture;
        if (dependencies) *dependencies = 0;
        return cudaSuccess;
    });
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
    return cudaStreamGetCaptureInfo(stream, status, nullptr, nullptr, nullptr, nullptr, nullptr);
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
    return std::swap(*mode, capture_mode), cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
    return call([&] { return *executable = new CUgraphExec_st{graph->works}, cudaSuccess; });
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long flags) {
    return cudaGraphInstantiate(executable, graph, flags);
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
    return call([&] {
        for (const Work& work : executable->works) enqueue(stream, work);
        return cudaSuccess;
    });
}
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t*, size_t* n) {
    return *n = graph->works.size(), cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    return call([&] { return delete graph, cudaSuccess; });
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
    return call([&] { return delete executable, cudaSuccess; });
}
}
