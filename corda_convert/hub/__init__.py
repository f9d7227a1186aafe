"""Publishing to the Hugging Face Hub, in one commit that is checked afterwards.

The endpoint, the token and the caches are the client's own business (HF_ENDPOINT, HF_TOKEN, `hf auth login`). Whatever
goes wrong there leaves this package as `PublishFailed`, without a token in its text.
"""

from corda_convert.hub.access import check_access
from corda_convert.hub.client import LOG_IN, connected, redacted, translated_errors
from corda_convert.hub.files import PublishedFile, finished_file, published_content, published_files
from corda_convert.hub.publishing import Destination, Publication, Upload, push_folder
from corda_convert.hub.streaming import MOST_FILES, StreamedUpload

__all__ = [
    "LOG_IN",
    "MOST_FILES",
    "Destination",
    "Publication",
    "PublishedFile",
    "StreamedUpload",
    "Upload",
    "check_access",
    "connected",
    "finished_file",
    "published_content",
    "published_files",
    "push_folder",
    "redacted",
    "translated_errors",
]
