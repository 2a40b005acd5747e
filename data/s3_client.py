"""boto3's client as everything here that reads or writes objects uses it. Imports boto3 when it is called."""

from typing import Any


def s3_client(*, endpoint_url: str | None = None, connections: int = 10, attempts: int = 5) -> Any:
    """A client of any maker's store; endpoint and credentials are those of AWS's own configuration (AWS_PROFILE,
    AWS_ENDPOINT_URL_S3, a role of the machine …) where they are not given.

    Args:
        connections: kept open at once, for as many threads.
        attempts: of each request, with boto3's own pauses between them.
    """
    import boto3
    from botocore.config import Config

    config = Config(
        max_pool_connections=connections,
        connect_timeout=10,
        read_timeout=60,
        retries={"total_max_attempts": attempts, "mode": "standard"},
        # Our own sha256 stands for checksums that not every store has.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    # A session of its own: boto3's default one is not made for threads.
    client = boto3.session.Session().client("s3", endpoint_url=endpoint_url, config=config)
    client.meta.events.register("before-call.s3.HeadBucket", _region_unknown)
    return client


def _region_unknown(**request: Any) -> tuple[Any, dict[str, Any]]:
    """The answer to the request with which botocore, redirected without being told to which region, asks for it: a
    server that redirects everything redirects that too, without end. Nothing here asks it otherwise."""
    from botocore.awsrequest import AWSResponse

    return AWSResponse("", 200, {}, None), {"ResponseMetadata": {"HTTPStatusCode": 200, "HTTPHeaders": {}}}
