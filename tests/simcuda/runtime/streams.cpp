// Streams and events.
#include <algorithm>

#include "machine.h"

using namespace simcuda;

static CUgraph_st* capture_of(const Record& record) {
    for (CUgraph_st* graph : machine().captures)
        if (graph->id == record.capture) return graph;
    return nullptr;
}

extern "C" {

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int priority) {
    return call([&] {
        Queue* queue = flags & cudaStreamNonBlocking ? new Queue : &machine().devices[current_device].queue;
        *stream = machine().streams.emplace_back(new CUstream_st{current_device, priority, queue});
        return cudaSuccess;
    });
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* s, unsigned flags) {
    return cudaStreamCreateWithPriority(s, flags, 0);
}
cudaError_t cudaStreamCreate(cudaStream_t* s) { return cudaStreamCreateWithFlags(s, 0); }
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    return call([&] {
        drain(stream);
        auto& streams = machine().streams;
        streams.erase(std::remove(streams.begin(), streams.end(), stream), streams.end());
        return delete stream, cudaSuccess;  // its queue stays: events may name it
    });
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    return call_that_waits([&] { return drain(stream), take_failure(); });
}
// Not ready when first asked: what polls must be right with either answer.
cudaError_t cudaStreamQuery(cudaStream_t stream) {
    return call_outside_of_capture([&] {
        if (stream_of(stream)->queue->empty()) return take_failure();
        return drain(stream), cudaErrorNotReady;
    });
}
cudaError_t cudaStreamGetPriority(cudaStream_t s, int* priority) {
    return *priority = stream_of(s)->priority, cudaSuccess;
}
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* data) {
    return call([&] { return enqueue(stream, [=] { function(data); }), cudaSuccess; });
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* e, unsigned flags) {
    return call([&] { return *e = new CUevent_st{current_device, flags}, cudaSuccess; });
}
cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t event) {
    return call([&] { return delete event, cudaSuccess; });
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t handle, unsigned flags) {
    return call([&] {
        CUstream_st* stream = stream_of(handle);
        if (event->device != stream->device) return cudaErrorInvalidResourceHandle;
        bool is_captured = stream->capture && !(flags & cudaEventRecordExternal);
        auto record = std::make_shared<Record>();
        event->record = record;
        record->queue = stream->queue;
        record->capture = is_captured ? stream->capture->id : 0;
        if (is_captured) return cudaSuccess;
        enqueue(handle, [record] {
            record->is_done = true;
            record->when = std::chrono::steady_clock::now();
        });
        return cudaSuccess;
    });
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    return cudaEventRecordWithFlags(event, stream, 0);
}
cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event, unsigned) {
    return call([&] {
        CUstream_st* stream = stream_of(handle);
        auto record = event->record;
        if (!record || record->is_done) return cudaSuccess;
        if (CUgraph_st* graph = capture_of(*record)) {  // the stream takes part in that capture from now on
            if (stream->capture && stream->capture != graph) return cudaErrorStreamCaptureIsolation;
            return stream->capture = graph, cudaSuccess;
        }
        if (stream->capture) return stream->capture->is_broken = true, cudaErrorStreamCaptureIsolation;
        return stream->queue->push_back({nullptr, record}), cudaSuccess;
    });
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    return call_that_waits([&] {
        auto record = event->record;
        if (!record) return cudaSuccess;
        if (capture_of(*record)) return cudaErrorCapturedEvent;
        return reach(*record), take_failure();
    });
}
// The allocator asks about each block that another stream has used, when it needs memory: work stays late nonetheless.
cudaError_t cudaEventQuery(cudaEvent_t event) {
    return call_outside_of_capture([&] {
        auto record = event->record;
        if (!record || record->is_done) return take_failure();
        if (capture_of(*record)) return cudaErrorCapturedEvent;
        if (++record->asked % 1000 == 0) reach(*record);
        return cudaErrorNotReady;
    });
}
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t begin, cudaEvent_t end) {
    return call([&] {
        for (cudaEvent_t event : {begin, end}) {
            if (event->flags & cudaEventDisableTiming || !event->record) return cudaErrorInvalidResourceHandle;
            if (!event->record->is_done) return cudaErrorNotReady;
        }
        *milliseconds = std::chrono::duration<float, std::milli>(end->record->when - begin->record->when).count();
        return cudaSuccess;
    });
}
}
