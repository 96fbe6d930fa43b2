/* Ask a model of a zmqserve network one question and print its answer, with nothing but libzmq and msgpack-c.
 *
 * A REQ socket is all that a client needs which takes its answer as a whole: it adds the empty delimiter to the question and
 * takes it off the answer, and it waits for exactly one message. PROTOCOL.md tells every field by its number; `field(reply, 2)`
 * here is the field in row 2 of a table there. */
#include <errno.h>
#include <limits.h>
#include <math.h>
#include <msgpack.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <unistd.h>
#include <zmq.h>

enum { ANSWERED, FAILED, WRONG_USE, NO_CONTROLLER, TRY_LATER }; /* exit statuses */
enum { GENERATE = 2, GO_AWAY = 35, REPLY = 39, ERROR = 46 };   /* tags */
enum { CONNECT_MS = 3000, GRACE_MS = 2000 }; /* a controller ends a request at most 0.5 s after its deadline */

/* The codes that a network sends; those that are missing are made by other clients for themselves. */
static const struct {
    long code;
    const char *name;
} NAMES[] = {
    {40000, "RequestError"},    {40001, "MalformedMessage"}, {40003, "ProtocolMismatch"}, {40102, "Unauthenticated"},
    {40103, "Refused"},         {40104, "PermissionDenied"}, {40301, "UnknownModel"},     {40302, "InvalidParameter"},
    {40303, "ContextOverflow"}, {40304, "Unsupported"},      {40801, "DeadlineExceeded"}, {40901, "DuplicateRequest"},
    {42900, "RetryLater"},      {42901, "RateLimited"},      {42902, "QuotaExceeded"},    {42903, "Overloaded"},
    {42904, "SlowConsumer"},    {50000, "ZmqserveError"},    {50001, "BackendError"},     {50002, "OutOfMemory"},
    {50005, "NoWorker"},        {50007, "WorkerLost"},       {50201, "UpstreamError"},    {50301, "ModelLoading"},
    {50302, "GoingAway"},
};

static void fail(int status, const char *format, ...) {
    va_list args;
    va_start(args, format);
    fputs("ask: ", stderr);
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
    va_end(args);
    exit(status);
}

/* Reading. Trailing fields may be left out, so what is not there reads as nil, and nil reads as the field's default. */
static msgpack_object field(msgpack_object array, size_t number) {
    if (array.type == MSGPACK_OBJECT_ARRAY && number < array.via.array.size) return array.via.array.ptr[number];
    return (msgpack_object){.type = MSGPACK_OBJECT_NIL};
}

static long long integer(msgpack_object value) {
    return value.type == MSGPACK_OBJECT_POSITIVE_INTEGER || value.type == MSGPACK_OBJECT_NEGATIVE_INTEGER ? value.via.i64 : 0;
}

static double number(msgpack_object value) { /* an integer may stand where a float is expected */
    return value.type == MSGPACK_OBJECT_FLOAT64 || value.type == MSGPACK_OBJECT_FLOAT32 ? value.via.f64 : (double)integer(value);
}

static msgpack_object_str text(msgpack_object value) {
    return value.type == MSGPACK_OBJECT_STR ? value.via.str : (msgpack_object_str){.size = 0, .ptr = ""};
}

static void pack_text(msgpack_packer *packer, const char *bytes, size_t size) {
    msgpack_pack_str(packer, size);
    msgpack_pack_str_body(packer, bytes, size);
}

/* An array of 14: what comes after `params` keeps its default and may be left out. */
static void pack_generate(msgpack_packer *packer, uint64_t rid, const char *model, int deadline_ms, const char *prompt, size_t size,
                          unsigned long max_tokens) {
    msgpack_pack_array(packer, 14);
    msgpack_pack_int(packer, GENERATE);
    msgpack_pack_uint64(packer, rid);
    pack_text(packer, model, strlen(model));
    msgpack_pack_int(packer, 0); /* priority */
    msgpack_pack_int(packer, deadline_ms);
    msgpack_pack_nil(packer);    /* affinity */
    msgpack_pack_int(packer, 0); /* attempts */
    msgpack_pack_nil(packer);    /* fingerprint */
    msgpack_pack_nil(packer);    /* trace */
    msgpack_pack_false(packer);  /* stream: a REQ socket gets exactly one message */
    pack_text(packer, prompt, size);
    msgpack_pack_nil(packer);    /* messages */
    msgpack_pack_nil(packer);    /* token_ids */
    msgpack_pack_map(packer, max_tokens > 0);
    if (max_tokens > 0) {
        pack_text(packer, "max_tokens", 10);
        msgpack_pack_unsigned_long(packer, max_tokens);
    }
}

static double parsed(const char *argument) { /* NAN, which is in no range, where it is not a number */
    char *end;
    double value = strtod(argument, &end);
    return *argument && !*end ? value : NAN;
}

static uint64_t random_rid(void) { /* 63 bits from a secure source, never 0: who knows a rid may cancel its request */
    uint64_t rid = 0;
    while (rid == 0) {
        if (getrandom(&rid, sizeof rid, 0) != sizeof rid) fail(FAILED, "no random numbers: %s", strerror(errno));
        rid &= INT64_MAX;
    }
    return rid;
}

static char *read_all(FILE *file, size_t *size) {
    char *bytes = NULL;
    for (*size = 0; !feof(file) && !ferror(file);) {
        if (!(bytes = realloc(bytes, *size + 65536))) fail(FAILED, "no memory for a prompt of more than %zu bytes", *size);
        *size += fread(bytes + *size, 1, 65536, file);
    }
    if (ferror(file)) fail(FAILED, "the prompt could not be read: %s", strerror(errno));
    return bytes;
}

/* Print the answer, or what went wrong. Returns the exit status. */
static int show(msgpack_object message, uint64_t rid) {
    long long tag = integer(field(message, 0));
    if (tag == ERROR) {
        long long code = integer(field(message, 2)), retry_after_ms = integer(field(message, 5));
        msgpack_object retryable = field(message, 4);
        const char *name = "Error"; /* a code that a reader does not know is a plain error */
        for (size_t i = 0; i < sizeof NAMES / sizeof *NAMES; i++)
            if (NAMES[i].code == code) name = NAMES[i].name;
        fprintf(stderr, "ask: %lld %s: %.*s", code, name, (int)text(field(message, 3)).size, text(field(message, 3)).ptr);
        if (retry_after_ms > 0) fprintf(stderr, " (try again in %lld ms)", retry_after_ms);
        fputc('\n', stderr);
        /* `retryable` decides, not the code. */
        return retryable.type == MSGPACK_OBJECT_BOOLEAN && retryable.via.boolean ? TRY_LATER : FAILED;
    }
    if (tag == GO_AWAY) { /* it stands for the Error 50302 that a client of many messages gets next */
        fprintf(stderr, "ask: the controller is leaving: %.*s\n", (int)text(field(message, 1)).size, text(field(message, 1)).ptr);
        return TRY_LATER;
    }
    msgpack_object choice = field(field(message, 2), 0), usage = field(message, 3), timings = field(message, 4);
    if (tag != REPLY || (uint64_t)integer(field(message, 1)) != rid || choice.type != MSGPACK_OBJECT_ARRAY)
        fail(FAILED, "the answer is no Reply to this request but a message with tag %lld", tag);
    fwrite(text(field(choice, 0)).ptr, 1, text(field(choice, 0)).size, stdout);
    putchar('\n');
    fprintf(stderr, "ask: %lld + %lld tokens, finish reason %.*s, from %.*s after %.1f ms in queues and %.1f ms of work\n",
            integer(field(usage, 0)), integer(field(usage, 1)), (int)text(field(choice, 2)).size, text(field(choice, 2)).ptr,
            (int)text(field(timings, 0)).size, text(field(timings, 0)).ptr, number(field(timings, 1)), number(field(timings, 3)));
    return fflush(stdout) == 0 ? ANSWERED : FAILED;
}

int main(int argc, char **argv) {
    const char *endpoint = "tcp://127.0.0.1:5570";
    double timeout_s = 60, max_tokens = 0;
    for (int option; (option = getopt(argc, argv, "e:n:t:")) != -1;) {
        if (option == 'e') endpoint = optarg;
        if (option == 'n') max_tokens = parsed(optarg);
        if (option == 't') timeout_s = parsed(optarg);
        if (option == '?') optind = argc; /* getopt has said what is wrong */
    }
    if (argc - optind < 1 || argc - optind > 2 || !(max_tokens >= 0 && max_tokens <= INT_MAX) || !(timeout_s >= 0.001 && timeout_s <= 86400))
        fail(WRONG_USE, "usage: ask [-e ENDPOINT] [-t SECONDS, at most a day] [-n MAX_TOKENS] MODEL [PROMPT, else from standard input]");
    const char *model = argv[optind];
    size_t size = argc - optind == 2 ? strlen(argv[optind + 1]) : 0;
    char *typed = argc - optind == 2 ? NULL : read_all(stdin, &size);
    uint64_t rid = random_rid();

    int deadline_ms = (int)(timeout_s * 1000), receive_ms = deadline_ms + GRACE_MS, connect_ms = CONNECT_MS, on = 1, linger_ms = 0;
    void *context = zmq_ctx_new(), *socket = zmq_socket(context, ZMQ_REQ);
    if (!socket) fail(FAILED, "no socket: %s", zmq_strerror(zmq_errno()));
    zmq_setsockopt(socket, ZMQ_LINGER, &linger_ms, sizeof linger_ms);
    zmq_setsockopt(socket, ZMQ_IMMEDIATE, &on, sizeof on); /* send over a connection that is there, so that a missing one shows */
    zmq_setsockopt(socket, ZMQ_SNDTIMEO, &connect_ms, sizeof connect_ms);
    zmq_setsockopt(socket, ZMQ_RCVTIMEO, &receive_ms, sizeof receive_ms);
    if (zmq_connect(socket, endpoint) != 0) fail(WRONG_USE, "'%s' is not an endpoint: %s", endpoint, zmq_strerror(zmq_errno()));

    msgpack_sbuffer request;
    msgpack_packer packer;
    msgpack_sbuffer_init(&request);
    msgpack_packer_init(&packer, &request, msgpack_sbuffer_write);
    pack_generate(&packer, rid, model, deadline_ms, typed ? typed : argv[optind + 1], size, (unsigned long)max_tokens);
    if (zmq_send(socket, request.data, request.size, 0) < 0)
        fail(NO_CONTROLLER, "no controller at %s: nothing answered for %d s", endpoint, CONNECT_MS / 1000);
    msgpack_sbuffer_destroy(&request);
    free(typed);

    zmq_msg_t answer;
    msgpack_unpacked message;
    zmq_msg_init(&answer);
    msgpack_unpacked_init(&message);
    int received;
    while ((received = zmq_msg_recv(&answer, socket, 0)) < 0 && zmq_errno() == EINTR) continue; /* stopped, and run again */
    if (received < 0)
        fail(NO_CONTROLLER, "no answer from %s until %d s after the deadline: the controller is gone", endpoint, GRACE_MS / 1000);
    if (msgpack_unpack_next(&message, zmq_msg_data(&answer), zmq_msg_size(&answer), NULL) != MSGPACK_UNPACK_SUCCESS)
        fail(FAILED, "the answer is not msgpack");
    int status = show(message.data, rid);
    msgpack_unpacked_destroy(&message);
    zmq_msg_close(&answer);
    zmq_close(socket);
    zmq_ctx_term(context);
    return status;
}
