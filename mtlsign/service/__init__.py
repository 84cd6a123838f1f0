"""The verification service, all of it but Ray: claims come in from strangers, verdicts go out signed.

`app` is the door (FastAPI), `desk` takes requests and keeps them in `store` until every claim is answered,
`verifier` answers them, in this process or in a replica of `mtlsign.distributed.serve`. In reading order:
`app`, `api`, `desk`, `asked`, `store`, `verifier`, `pointers`, `files`, `suspects`, `bundles`, `signing`,
`pages`, `bulk`.
"""
