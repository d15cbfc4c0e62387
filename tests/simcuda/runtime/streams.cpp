// Streams and events.
#include <algorithm>

#include "machine.h"

using namespace simcuda;

static CUgraph_st* capture_of(const EventState& event) {
    for (CUgraph_st* graph : machine().captures)
        if (graph->id == event.capture) return graph;
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
    return call_outside_of_capture([&] { return drain(stream), take_failure(); });
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
    return call([&] { return ++machine().events, *e = new CUevent_st{current_device, flags}, cudaSuccess; });
}
cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t event) {
    return call([&] { return --machine().events, delete event, cudaSuccess; });
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t handle, unsigned flags) {
    return call([&] {
        CUstream_st* stream = stream_of(handle);
        if (event->device != stream->device) return cudaErrorInvalidResourceHandle;
        auto state = event->state;
        bool is_captured = stream->capture && !(flags & cudaEventRecordExternal);
        state->capture = is_captured ? stream->capture->id : 0;
        if (is_captured) return cudaSuccess;
        state->queue = stream->queue;
        enqueue(handle, [state, ticket = ++state->recorded] {
            state->done = std::max(state->done, ticket);
            state->when = std::chrono::steady_clock::now();
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
        auto state = event->state;
        if (CUgraph_st* graph = capture_of(*state)) {  // the stream takes part in that capture from now on
            if (stream->capture && stream->capture != graph) return cudaErrorStreamCaptureIsolation;
            return stream->capture = graph, cudaSuccess;
        }
        if (state->done >= state->recorded) return cudaSuccess;
        if (stream->capture) return stream->capture->is_broken = true, cudaErrorStreamCaptureIsolation;
        return stream->queue->push_back({nullptr, state, state->recorded}), cudaSuccess;
    });
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    return call_outside_of_capture([&] {
        if (capture_of(*event->state)) return cudaErrorCapturedEvent;
        return reach(*event->state, event->state->recorded), take_failure();
    });
}
cudaError_t cudaEventQuery(cudaEvent_t event) {
    return call_outside_of_capture([&] {
        EventState& state = *event->state;
        if (capture_of(state)) return cudaErrorCapturedEvent;
        if (state.done >= state.recorded) return take_failure();
        return reach(state, state.recorded), cudaErrorNotReady;
    });
}
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t begin, cudaEvent_t end) {
    return call([&] {
        for (cudaEvent_t event : {begin, end}) {
            if (event->flags & cudaEventDisableTiming || !event->state->recorded) return cudaErrorInvalidResourceHandle;
            if (event->state->done < event->state->recorded) return cudaErrorNotReady;
        }
        *milliseconds = std::chrono::duration<float, std::milli>(end->state->when - begin->state->when).count();
        return cudaSuccess;
    });
}
}
