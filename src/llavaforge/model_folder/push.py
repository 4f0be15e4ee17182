"""From a finished model folder to a repository of the Hugging Face hub.

Comes in: a folder, and a repository's name. Goes out: a commit with the folder's files. The token is the one that
`huggingface_hub` finds: HF_TOKEN, or that of `hf auth login`.
"""

import logging
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # not named in its __all__

from llavaforge.errors import RunFailed, UserError, reason

logger = logging.getLogger(__name__)

_WEIGHTS = ["*.safetensors", "*.bin", "*.index.json"]
# By the status of the hub's answer.
_REMEDIES = {
    401: "it does not take the token: make one at https://huggingface.co/settings/tokens and give it to "
    "`hf auth login`, or in HF_TOKEN",
    403: "the token may not write there: make one that may, at https://huggingface.co/settings/tokens",
    404: "there is no such owner, or the token does not reach it: check the name",
}


@dataclass(frozen=True)
class Repository:
    """Where a model folder goes.

    Attributes:
        name: OWNER/NAME.
        private: make it so that only its owner sees it.
        overwrite: replace the files of a repository that has some, in a new commit.
    """

    name: str
    private: bool = False
    overwrite: bool = False

    def check(self) -> None:
        """Check, before any work is done, what can be known of the upload.

        Raises:
            UserError: the name, the token or the repository of that name is not fit.
            RunFailed: the hub does not answer.
        """
        try:
            validate_repo_id(self.name)
        except HFValidationError as error:
            raise UserError(f"push_to_hub: {error}") from None
        if "/" not in self.name:
            raise UserError(f"push_to_hub: {self.name!r} lacks its owner. Give OWNER/NAME.")
        if get_token() is None:
            raise UserError("push_to_hub: no token of the hub is at hand. Run `hf auth login`, or set HF_TOKEN.")
        try:
            self._check_token(HfApi().whoami())
            self._check_existing()
        except UserError as error:
            raise UserError(f"push_to_hub: {error}.") from None
        except Exception as error:
            told = f"nothing was exported yet, as it could not be uploaded to {self.name}: {_why(error)}"
            raise _kind(error)(f"push_to_hub: {told}. (Without --push_to_hub the export needs no hub.)") from None

    def push(self, folder: Path) -> str:
        """Upload a folder's files.

        Returns:
            The repository's address.

        Raises:
            UserError: the hub refuses; says that the folder is complete, and how to upload it later.
            RunFailed: the network or the hub fails; the same.
        """
        try:
            url = str(HfApi().create_repo(self.name, private=self.private or None, exist_ok=True))
            self._check_existing()  # also when it was made since `check`
            HfApi().upload_folder(
                repo_id=self.name,
                folder_path=folder,
                commit_message="Export of llavaforge",
                # An older model's shards beside the new ones could be opened in their place.
                delete_patterns=_WEIGHTS if self.overwrite else None,
            )
        except Exception as error:  # the uploader raises what its own libraries raise
            why = str(error) if isinstance(error, UserError) else _why(error)
            later = f"hf upload {self.name} {shlex.quote(str(folder))} .{' --private' * self.private}"
            raise _kind(error)(
                f"{folder}: the export is finished and verified, but not uploaded to {self.name}: {why}. "
                f"Upload it later: {later}"
            ) from None
        logger.info("uploaded to %s", url)
        return url

    def _check_token(self, user: dict[str, Any]) -> None:
        role = user.get("auth", {}).get("accessToken", {}).get("role")
        if role == "read":
            raise UserError(
                "the token may only read: make one that may write, at https://huggingface.co/settings/tokens"
            )
        owners = [str(user.get("name")), *(str(group.get("name")) for group in user.get("orgs", []))]
        if role == "write" and self.name.split("/")[0].lower() not in map(str.lower, owners):
            raise UserError(f"{self.name}: the token is one of {', '.join(owners)}. Give OWNER/NAME with such an owner")

    def _check_existing(self) -> None:
        """Refuse a repository that is not as asked for, or has files already."""
        try:
            found = HfApi().model_info(self.name)
        except RepositoryNotFoundError as error:
            if error.response.status_code == 401:
                raise
            return
        if self.private and not found.private:
            raise UserError(
                f"{self.name} is there already, and public. Make it private in its settings, leave "
                "--private out, or give another name"
            )
        files = sorted(file.rfilename for file in found.siblings or [] if file.rfilename != ".gitattributes")
        if files and not self.overwrite:
            raise UserError(
                f"{self.name} has files already ({', '.join(files[:3])}{', ...' * (len(files) > 3)}). Give "
                "another name, or --overwrite for a commit that replaces them (the hub keeps those before it)"
            )


def _kind(error: Exception) -> type[UserError]:
    return UserError if isinstance(error, UserError) or _status(error) in _REMEDIES else RunFailed


def _why(error: Exception) -> str:
    remedy = _REMEDIES.get(_status(error) or 0)
    return f"{remedy} ({reason(error)})" if remedy else f"{reason(error)} (check the network, or try again later)"


def _status(error: BaseException | None) -> int | None:
    """Return the status of the hub's answer, which an error of a thread has as its cause."""
    while error is not None:
        if (status := getattr(getattr(error, "response", None), "status_code", None)) is not None:
            return int(status)
        error = error.__cause__
    return None
