"""HTTP verification service without Ray: claims of untrusted clients in, signed verdicts out.

`app` builds the ASGI application from the routes in `http` and `web`. `queue` stores requests in `database`
and schedules them. `verifier` verifies claims, in this process or in a replica of
`mtlsign.distributed.serve`, and `fetch` brings models to its machine. `auth` holds tokens and signing keys,
`batch` verifies files of claims.
"""
